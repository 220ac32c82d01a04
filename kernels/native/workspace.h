// Scratch memory that outlives a pass. Fresh pages have to be cleared by the system, which at a thousand rows is a
// good part of a pass; so each calling thread keeps a block of up to kKept bytes for its next call.
#pragma once

#include <stddef.h>

class Workspace {
  static constexpr size_t kKept = size_t(32) << 20, kBig = size_t(4) << 20;
  void* data_ = nullptr;
  size_t capacity_ = 0;

 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace();

  // 64-byte aligned; null when there is not enough. Once only.
  char* take(size_t bytes);
};

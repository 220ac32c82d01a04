#include "workspace.h"

#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

struct Kept {
  void* data = nullptr;
  size_t capacity = 0;
  ~Kept() { free(data); }
};
thread_local Kept kept;

}  // namespace

char* Workspace::take(size_t bytes) {
  if (kept.data && bytes <= kept.capacity) {
    data_ = kept.data;
    capacity_ = kept.capacity;
    kept.data = nullptr;
    return (char*)data_;
  }
  free(kept.data);
  kept.data = nullptr;
  const size_t page = bytes > kBig ? size_t(2) << 20 : 64;  // in pages of 2 MiB, where there are such
  capacity_ = (bytes + page) / page * page;
  data_ = aligned_alloc(page, capacity_);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (data_ && page > 64) madvise(data_, capacity_, MADV_HUGEPAGE);
#endif
  return (char*)data_;
}

Workspace::~Workspace() {
  if (data_ && capacity_ <= kKept && !kept.data) {
    kept.data = data_;
    kept.capacity = capacity_;
  } else {
    free(data_);
  }
}

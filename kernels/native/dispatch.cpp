// The library's interface: picks the best instruction set that this processor and this build have.
#include <stdlib.h>
#include <string.h>

#include "structure.h"

#define DECLARE(isa)                   \
  int run_##isa(const StructurePass&); \
  void adamw_##isa(const AdamWStep&);
DECLARE(baseline)
#if defined(__x86_64__)
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512bf16)
#endif

namespace {

struct InstructionSet {
  const char* name;
  bool available;
  int (*run)(const StructurePass&);
  void (*adamw)(const AdamWStep&);
};

// The best comes first. SADM_KERNELS_ISA names another one, to test or to measure it.
const InstructionSet& chosen() {
  static const InstructionSet& choice = [&]() -> const InstructionSet& {
    static const InstructionSet sets[] = {
#if defined(__x86_64__)
        {"avx512bf16", __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                           __builtin_cpu_supports("avx512bf16"), run_avx512bf16, adamw_avx512bf16},
        {"avx512", __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"), run_avx512, adamw_avx512},
        {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), run_avx2, adamw_avx2},
#endif
        {"baseline", true, run_baseline, adamw_baseline},
    };
    const char* wanted = getenv("SADM_KERNELS_ISA");
    for (const InstructionSet& set : sets)
      if (set.available && wanted && strcmp(wanted, set.name) == 0) return set;
    for (const InstructionSet& set : sets)
      if (set.available) return set;
    return sets[0];
  }();
  return choice;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int32_t structure_interface() { return kInterface; }
__attribute__((visibility("default"))) const char* structure_instruction_set() { return chosen().name; }

// kDone, kNoMemory or kOutOfRange.
__attribute__((visibility("default"))) int32_t structure_pass(const StructurePass* task) { return chosen().run(*task); }

__attribute__((visibility("default"))) void adamw_step(const AdamWStep* step) { chosen().adamw(*step); }

}

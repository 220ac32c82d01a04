// Compiled for one instruction set: CMakeLists.txt says with which flags.
#define ISA avx512bf16
#include "adamw.h"
#include "pass.h"

int run_avx512bf16(const StructurePass& task) { return ISA::run(task); }
void adamw_avx512bf16(const AdamWStep& step) { ISA::adamw_step(step); }

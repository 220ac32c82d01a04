// Compiled for one instruction set: CMakeLists.txt says with which flags.
#define ISA avx512
#include "adamw.h"
#include "pass.h"

int run_avx512(const StructurePass& task) { return ISA::run(task); }
void adamw_avx512(const AdamWStep& step) { ISA::adamw_step(step); }

// Compiled for one instruction set: CMakeLists.txt says with which flags.
#define ISA avx2
#include "adamw.h"
#include "pass.h"

int run_avx2(const StructurePass& task) { return ISA::run(task); }
void adamw_avx2(const AdamWStep& step) { ISA::adamw_step(step); }

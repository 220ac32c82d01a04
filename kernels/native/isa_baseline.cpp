// Compiled for one instruction set: CMakeLists.txt says with which flags.
#define ISA baseline
#include "adamw.h"
#include "pass.h"

int run_baseline(const StructurePass& task) { return ISA::run(task); }
void adamw_baseline(const AdamWStep& step) { ISA::adamw_step(step); }

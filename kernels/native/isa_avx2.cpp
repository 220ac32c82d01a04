// Compiled for one instruction set: CMakeLists.txt says with which flags.
#define ISA avx2
#include "pass.h"

int run_avx2(const StructurePass& task) { return ISA::run(task); }

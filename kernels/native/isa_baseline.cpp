// Compiled for one instruction set: CMakeLists.txt says with which flags.
#define ISA baseline
#include "pass.h"

int run_baseline(const StructurePass& task) { return ISA::run(task); }

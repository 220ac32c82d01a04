// What functions outside of the instruction sets' own files are marked with.
#pragma once

// Compiled for several instruction sets; the loader picks one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif
// Seen by Python.
#define EXPORT extern "C" __attribute__((visibility("default")))

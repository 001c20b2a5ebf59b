// How CPU kernels are compiled: once for any x86-64, once for AVX2, once for AVX-512, chosen when the program is loaded.
//
// ULY_CLONES goes on a function that is no template; what it calls must be ULY_INLINE to be compiled along with it.
// ULY_LANES goes before a loop whose iterations are independent although pointers may be equal.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define ULY_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define ULY_CLONES
#endif

#define ULY_INLINE inline __attribute__((always_inline))
#define ULY_INLINE_LAMBDA __attribute__((always_inline))
#define ULY_LANES _Pragma("GCC ivdep")

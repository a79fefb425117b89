// Loops that are unrolled whole: an array of vectors stays in registers only where every index into it is a constant.
#pragma once

#if defined(__clang__)
#define GRADAUG_UNROLL _Pragma("unroll")
#else
#define GRADAUG_UNROLL _Pragma("GCC unroll 36")  // at least the longest of them: the places of a Winograd tile
#endif

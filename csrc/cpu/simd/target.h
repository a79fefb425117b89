// After GRADAUG_TARGET_BEGIN(features), the functions of a translation unit are compiled for those features of x86-64,
// up to GRADAUG_TARGET_END, its last line: gcc instantiates templates at the end, for what is the target there.
//
// Whatever other headers the kernels need is included here, before: of an inline function that several translation
// units contain the linker keeps any one, and that must not be the one for a processor that is not there.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define GRADAUG_PRAGMA(...) _Pragma(#__VA_ARGS__)

#if defined(__clang__)
#define GRADAUG_TARGET_BEGIN(features) \
  GRADAUG_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define GRADAUG_TARGET_END GRADAUG_PRAGMA(clang attribute pop)
#else
#define GRADAUG_TARGET_BEGIN(features)                                                                  \
  GRADAUG_PRAGMA(GCC diagnostic ignored "-Wmaybe-uninitialized") /* false alarms in gcc 12's headers */ \
  GRADAUG_PRAGMA(GCC diagnostic ignored "-Wuninitialized")                                              \
  GRADAUG_PRAGMA(GCC target(features))
#define GRADAUG_TARGET_END
#endif

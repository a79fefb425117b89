// The kernels of the convolutions, compiled for the vectors S of an instruction set: what its translation unit
// includes.
#pragma once

#include "cpu/microkernels/depthwise.h"
#include "cpu/microkernels/gemm.h"
#include "cpu/microkernels/outer.h"
#include "cpu/microkernels/pack.h"
#include "cpu/microkernels/winograd.h"

namespace gradaug::cpu {
namespace {

template <class S>
constexpr Kernels gemm_table = {
    .pair = S::pair,
    .lanes = S::lanes,
    .panel = Pack<S>::panel,
    .max_rows = S::max_rows,
    .gemm = gemm<S>,
    .outer = outer<S>,
    .load_pixels = Pack<S>::load_pixels,
    .pack_panel = Pack<S>::pack_panel,
    .load_panels = Pack<S>::load_panels,
    .zip_panels = Pack<S>::zip_panels,
    .winograd = {&Winograd<S, F2<S>>::table, &Winograd<S, F4<S>>::table},
};

}  // namespace
}  // namespace gradaug::cpu

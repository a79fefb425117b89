// The kernels of batch norm and max pooling, compiled for the elements S of an instruction set: what its translation
// unit includes.
#pragma once

#include "cpu/microkernels/kernel_tables.h"
#include "cpu/norm/max_pool.h"
#include "cpu/norm/planes.h"
#include "cpu/norm/rows.h"

namespace gradaug::batch_norm {
namespace {

template <class S>
constexpr NormKernels<typename S::T> norm_table = {
    .width = S::width,
    .row_centers = Centers<S>::run,
    .row_moments = row_moments<S>,
    .row_apply = RowVariants<S>::apply,
    .row_gradient_sums = RowVariants<S>::gradient_sums,
    .row_input_gradients = RowVariants<S>::input_gradients,
    .plane_moments = plane_moments<S>,
    .plane_apply = PlaneVariants<S>::apply,
    .plane_gradient_sums = PlaneVariants<S>::gradient_sums,
    .plane_input_gradients = PlaneVariants<S>::input_gradients,
    .largest = largest<S>,
    .sum_of_windows = sum_of_windows<S>,
};

// Of a set that serves every type.
template <template <typename> class Elements>
constexpr cpu::NormTables norm_tables = {
    .f64 = &norm_table<Elements<double>>,
    .f32 = &norm_table<Elements<float>>,
    .bf16 = &norm_table<Elements<c10::BFloat16>>,
    .f16 = &norm_table<Elements<c10::Half>>,
};

}  // namespace
}  // namespace gradaug::batch_norm

// Who computes a convolution: for each direction a list of paths in order, of which the first that applies is taken.
// paths.cpp has the lists and every condition; the operators describe a problem and call `run`.
#pragma once

#include <c10/util/FunctionRef.h>

#include <string>
#include <vector>

#include "cpu/conv/problem.h"

namespace gradaug::cpu {

// Computes a problem. The operands' memory is not needed for the choice:
// operands: gives the problem its pointers, and calls for copies and results; not called where PyTorch computes it.
// torch: PyTorch's own operator on the tensors, the last path of each list.
void run(GatherProblem& problem, c10::function_ref<void()> operands, c10::function_ref<void()> torch);
void run(WeightGradProblem& problem, c10::function_ref<void()> operands, c10::function_ref<void()> torch);

// What a list says about a path: one sentence or null each.
struct Verdict {
  std::string pixels;  // which of the result the path was asked for, where a stride divides them into phases
  const char* path;
  const char* cannot;  // why it cannot compute the problem
  const char* loses;   // why another is chosen where both could
};
std::vector<Verdict> explain(GatherProblem& problem);
std::vector<Verdict> explain(WeightGradProblem& problem);

// For tests and benchmarks: from `watch` to `unwatch` the name of every path that runs is kept, and `forced`, if it is
// not empty, is taken wherever it can compute the problem; elsewhere `run` raises.
void watch(const std::string& forced);
std::vector<std::string> unwatch();

// ---- the paths

void depthwise_forward(const GatherProblem& problem, const Phase& phase);  // all phases at once
void winograd_forward(const GatherProblem& problem, const Phase& phase, const WinogradKernels& tile);
void small_image_gemm(const GatherProblem& problem, const Phase& phase);
void implicit_gemm(const GatherProblem& problem, const Phase& phase);

void depthwise_weight_grad(const WeightGradProblem& problem);
void first_layer_weight_grad(const WeightGradProblem& problem);
void winograd_weight_grad(const WeightGradProblem& problem, const WinogradKernels& tile);
void weight_grad(const WeightGradProblem& problem);

}  // namespace gradaug::cpu

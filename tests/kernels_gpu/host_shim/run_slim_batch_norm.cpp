// The kernels of csrc/cuda/slim_batch_norm.cuh on the CPU. Cases: "forward", "backward".
//
// integers  type of x (0 float16, 1 bfloat16, 2 float32, 3 float64), multiprocessors, Extent's fields in order, relu or
//           batch_stats; then of every activation offset, line and channel stride in elements, of every parameter
//           whether it is in the dtype of x, in the order of the tensors
// numbers   eps
// tensors   forward:  x, residual, y; weight, bias; given mean, given var, mean, var
//           backward: dy, x, y, dx, dz; weight, dweight, dbias; mean, var
//           the number of elements of dweight and of dbias follows whether they are in the dtype of x
#include "cuda/slim_batch_norm.cuh"
#include "runner.h"

using namespace gradaug::batch_norm;

template <typename T>
Lines<T> lines(Case& c, size_t index) {
  T* data = const_cast<T*>(c.tensor<T>(index));
  const int64_t offset = c.integer(), line = c.integer(), channel = c.integer();
  return {data == nullptr ? nullptr : data + offset, line, channel};
}

Parameter parameter(Case& c, size_t index) { return {c.tensor<void>(index), 1, c.integer() != 0}; }

template <typename T>
void run_typed(Case& c) {
  using A = Accumulator<T>;
  const int multiprocessors = static_cast<int>(c.integer());
  Extent e{};
  e.rows = c.integer() != 0;
  e.channels = c.integer(), e.lines = c.integer(), e.length = c.integer();
  const bool flag = c.integer() != 0;
  const double eps = c.numbers.at(0);
  Plan plan;
  const auto workspace = [&](bool aligned) {
    plan = make_plan<T>(e, aligned, multiprocessors);
    return std::unique_ptr<double[]>(new double[workspace_size(plan)]);
  };
  if (c.name == "forward") {
    ForwardTensors<T> t{};
    t.x = lines<const T>(c, 0), t.residual = lines<const T>(c, 1), t.y = lines<T>(c, 2);
    t.weight = parameter(c, 3), t.bias = parameter(c, 4);
    t.given_mean = {c.tensor<A>(5), 1}, t.given_var = {c.tensor<A>(6), 1};
    t.mean = c.tensor<A>(7), t.var = c.tensor<A>(8);
    const auto own = workspace(vectorisable(t.x) && vectorisable(t.residual) && vectorisable(t.y));
    launch_forward(plan, t, flag, eps, own.get(), nullptr);
  } else {
    BackwardTensors<T> t{};
    t.dy = lines<const T>(c, 0), t.x = lines<const T>(c, 1), t.y = lines<const T>(c, 2);
    t.dx = lines<T>(c, 3), t.dz = lines<T>(c, 4);
    t.weight = parameter(c, 5);
    for (ParameterGradient* gradient : {&t.dweight, &t.dbias}) {
      const size_t index = gradient == &t.dweight ? 6 : 7;
      *gradient = {c.tensor<void>(index), 0, c.integer() != 0};
      gradient->size = c.integer();
    }
    t.mean = {c.tensor<A>(8), 1}, t.var = {c.tensor<A>(9), 1};
    const auto own = workspace(vectorisable(t.dy) && vectorisable(t.x) && vectorisable(t.y) && vectorisable(t.dx) &&
                               vectorisable(t.dz));
    launch_backward(plan, t, flag, eps, own.get(), nullptr);
  }
}

void run(Case& c) {
  switch (c.integer()) {
    case 0:
      return run_typed<__half>(c);
    case 1:
      return run_typed<__nv_bfloat16>(c);
    case 2:
      return run_typed<float>(c);
    default:
      return run_typed<double>(c);
  }
}

int main(int argc, char** argv) { return run_cases(argc, argv, {{"forward", run}, {"backward", run}}); }

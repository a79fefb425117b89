// Runs the cases of a file and writes what they leave in their tensors:  runner CASES RESULTS
//
// A case is a kernel's name, integers (sizes, strides, types), floating-point numbers and tensors, which are bytes.
// Every tensor lives in a heap block of its exact size, so that AddressSanitizer sees an access one element beyond it.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

struct Case {
  std::string name;
  std::vector<int64_t> integers;
  std::vector<double> numbers;
  std::vector<std::unique_ptr<unsigned char[]>> tensors;  // null where there is none
  std::vector<uint64_t> sizes;
  size_t next_integer = 0;

  int64_t integer() { return integers.at(next_integer++); }
  template <typename T>
  T* tensor(size_t index) {
    return reinterpret_cast<T*>(tensors.at(index).get());
  }
};

using Runners = std::map<std::string, std::function<void(Case&)>>;

inline void read_exactly(void* target, size_t bytes, FILE* file) {
  if (std::fread(target, 1, bytes, file) != bytes) {
    std::fprintf(stderr, "the file of cases ends early\n");
    std::exit(2);
  }
}

template <typename T>
T read_value(FILE* file) {
  T value;
  read_exactly(&value, sizeof(value), file);
  return value;
}

inline int run_cases(int argc, char** argv, const Runners& runners) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s CASES RESULTS\n", argv[0]);
    return 2;
  }
  alarm(300);  // a thread that misses a barrier leaves the others waiting for ever
  FILE* input = std::fopen(argv[1], "rb");
  FILE* output = std::fopen(argv[2], "wb");
  if (input == nullptr || output == nullptr) {
    std::fprintf(stderr, "cannot open %s and %s\n", argv[1], argv[2]);
    return 2;
  }
  for (uint32_t count = read_value<uint32_t>(input); count > 0; --count) {
    Case c;
    c.name.resize(read_value<uint32_t>(input));
    read_exactly(c.name.data(), c.name.size(), input);
    c.integers.resize(read_value<uint32_t>(input));
    if (!c.integers.empty()) read_exactly(c.integers.data(), c.integers.size() * sizeof(int64_t), input);
    c.numbers.resize(read_value<uint32_t>(input));
    if (!c.numbers.empty()) read_exactly(c.numbers.data(), c.numbers.size() * sizeof(double), input);
    c.sizes.resize(read_value<uint32_t>(input));
    for (uint64_t& size : c.sizes) {
      size = read_value<uint64_t>(input);
      c.tensors.emplace_back(size > 0 ? new unsigned char[size] : nullptr);
      if (size > 0) read_exactly(c.tensors.back().get(), size, input);
    }
    runners.at(c.name)(c);
    for (size_t i = 0; i < c.sizes.size(); ++i) {
      if (c.sizes[i] > 0) std::fwrite(c.tensors[i].get(), 1, c.sizes[i], output);
    }
  }
  std::fclose(input);
  std::fclose(output);
  return 0;
}

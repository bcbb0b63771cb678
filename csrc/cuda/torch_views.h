// Between torch's stable ABI and views: checks, layouts, outputs, the current stream.
//
// Three builds share the registration: CUDA starts the kernels (torch.ops.fastalex_cuda), a caller
// does (planner/), or the tests run them on the CPU. The last two define FASTALEX_WITHOUT_CUDA and
// a namespace of their own, and take tensors of any device.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "ops.h"
#include "require.h"

#ifndef FASTALEX_NAMESPACE
#define FASTALEX_NAMESPACE fastalex_cuda
#endif
// A macro's argument is expanded before it becomes part of a name only one call further down.
#define FASTALEX_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define FASTALEX_LIBRARY_FRAGMENT(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(ns, m)
#define FASTALEX_LIBRARY_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)

namespace fastalex {

using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;
using torch::headeronly::ScalarType;

std::string describe(const Tensor& t);
DType dtype_of(const Tensor& t, const char* op);

// Refuses, with the reason and the mend, what these kernels cannot take.
void check_cuda(const Tensor& t, const char* op, const char* name);
void check_like(const Tensor& t, const Tensor& input, const char* op, const char* name);

// [N, C, ...] as [N, C, rows, columns]; the trailing dimensions must fold (see `dense`).
View view_of(const Tensor& t);

// Where the elements are; a meta tensor, whose launches are only planned, pretends to a place.
void* address_of(const Tensor& t);

// The layout that results take: fastalex/_geometry.py has the same rule for the fakes.
bool is_channels_last(const Tensor& t);
// `t` itself if its channels or its columns lie side by side, else one copy in the nearest layout.
Tensor dense(const Tensor& t);
// The same, in a given layout.
Tensor dense_as(const Tensor& t, bool channels_last);

// Uninitialised and dense, on `like`'s device.
Tensor empty(const Sizes& sizes, ScalarType dtype, const Tensor& like, bool channels_last);

// Memory for what one operator's kernels leave to each other.
Tensor workspace_of(long long bytes, const Tensor& like);

// Outputs of one axis of a pooling, by torch's rule.
int64_t pool_outputs(int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                     int64_t dilation, bool ceil_mode);

// Makes `t`'s device current for a scope and knows its stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t);
  Stream stream() const { return stream_; }

 private:
#ifndef FASTALEX_WITHOUT_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Stream stream_ = nullptr;
};

// Runs a launcher; an error gains the operator and its tensors' shapes.
template <class Function>
void launched(const char* op, std::initializer_list<const Tensor*> tensors, Function function) {
  try {
    function();
  } catch (const std::exception& error) {
    std::string text = std::string(error.what()) + " [fastalex::" + op;
    for (const Tensor* t : tensors) text += " " + describe(*t);
    throw std::runtime_error(text + "]");
  }
}

}  // namespace fastalex

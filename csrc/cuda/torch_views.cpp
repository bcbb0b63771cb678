// Checks on torch tensors and their translation to views, all through the stable ABI.
#include "torch_views.h"

#include <algorithm>
#include <cstring>

// Exported by every CUDA build of torch 2.11 and newer; weak, so that this library also loads
// beside a CPU build.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace fastalex {
namespace {

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    default:
      return "another dtype";
  }
}

int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    default:
      return aoti_torch_dtype_uint8();
  }
}

Sizes dense_strides(const Sizes& sizes, bool channels_last) {
  Sizes strides(sizes.size());
  int64_t step = 1;
  if (channels_last) strides[1] = 1, step = std::max<int64_t>(sizes[1], 1);
  for (size_t d = sizes.size(); d-- > 0;) {
    if (channels_last && d == 1) continue;
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  return strides;
}

// Whether dimensions 2 to the last but one can be walked with one stride.
bool rows_fold(const Tensor& t) {
  for (int64_t d = 2; d + 2 < t.dim(); d++)
    if (t.size(d) > 1 && t.size(d + 1) > 1 && t.stride(d) != t.size(d + 1) * t.stride(d + 1))
      return false;
  return true;
}

bool planes_are_dense(const Tensor& t) {
  int64_t step = 1;
  for (int64_t d = t.dim() - 1; d >= 2; d--) {
    if (t.size(d) != 1 && t.stride(d) != step) return false;
    step *= t.size(d);
  }
  return true;
}

}  // namespace

std::string describe(const Tensor& t) {
  std::string text = std::string(name_of(t.scalar_type())) + "[";
  for (int64_t d = 0; d < t.dim(); d++) text += (d ? ", " : "") + std::to_string(t.size(d));
  text += "] strides (";
  for (int64_t d = 0; d < t.dim(); d++) text += (d ? ", " : "") + std::to_string(t.stride(d));
  return text + ")";
}

DType dtype_of(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      fail(op, "input is ", name_of(t.scalar_type()),
           "; it must be float32, float16 or bfloat16: convert it, or use the torch backend");
  }
}

void check_cuda(const Tensor& t, const char* op, const char* name) {
#ifdef FASTALEX_WITHOUT_CUDA
  const bool served = true;
#else
  const bool served = t.is_cuda();
#endif
  require(served, op, name,
          " is not on a CUDA device: move it with .cuda(), or use the cpu or torch backend");
  require(is_aligned(t.data_ptr(), t.element_size()), op, name,
          " does not start at a multiple of its elements' size: clone() it");
}

void check_like(const Tensor& t, const Tensor& input, const char* op, const char* name) {
  check_cuda(t, op, name);
  require(t.get_device_index() == input.get_device_index(), op, "input is on CUDA device ",
          input.get_device_index(), " and ", name, " on ", t.get_device_index(),
          ": move one with .to()");
  require(t.scalar_type() == input.scalar_type(), op, "input is ", name_of(input.scalar_type()),
          " and ", name, " ", name_of(t.scalar_type()),
          "; they must agree: convert one with .to()");
}

void* address_of(const Tensor& t) {
  void* address = t.data_ptr();
#ifdef FASTALEX_WITHOUT_CUDA
  if (!address && t.numel()) address = reinterpret_cast<void*>(256);
#endif
  return address;
}

View view_of(const Tensor& t) {
  View v = {address_of(t), {t.size(0), t.size(1), 1, 1}, {t.stride(0), t.stride(1), 0, 0}};
  const int64_t last = t.dim() - 1;
  if (last >= 2) v.size[3] = t.size(last), v.stride[3] = t.stride(last);
  for (int64_t d = last - 1; d >= 2; d--) {
    if (v.size[2] == 1) v.stride[2] = t.stride(d);
    v.size[2] *= t.size(d);
  }
  return v;
}

bool is_channels_last(const Tensor& t) {
  if (t.is_contiguous() || (t.size(1) > 1 && t.stride(1) != 1)) return false;
  return rows_fold(t) && !planes_are_dense(t);
}

Tensor dense(const Tensor& t) {
  const bool columns = t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) == 1;
  if ((columns || is_channels_last(t)) && rows_fold(t)) return t;
  return torch::stable::contiguous(t);
}

Tensor dense_as(const Tensor& t, bool channels_last) {
  if (is_channels_last(t) == channels_last) return dense(t);
  const auto sizes = t.sizes();
  Tensor copy = empty(Sizes(sizes.begin(), sizes.end()), t.scalar_type(), t, channels_last);
  torch::stable::copy_(copy, t);
  return copy;
}

Tensor empty(const Sizes& sizes, ScalarType dtype, const Tensor& like, bool channels_last) {
  const Sizes strides = dense_strides(sizes, channels_last);
  int32_t device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               dtype_code(dtype), device, like.get_device_index(), &handle));
  Tensor made(handle);
#ifdef FASTALEX_POISON  // NaN in every type: tests see what nobody wrote
  if (made.numel()) std::memset(made.data_ptr(), 0xff, made.numel() * made.element_size());
#endif
  return made;
}

Tensor workspace_of(long long bytes, const Tensor& like) {
  return empty({bytes}, ScalarType::Byte, like, false);
}

int64_t pool_outputs(int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                     int64_t dilation, bool ceil_mode) {
  const int64_t reach = size + 2 * padding - dilation * (kernel - 1) - 1;
  const int64_t outputs = (reach + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  return ceil_mode && (outputs - 1) * stride >= size + padding ? outputs - 1 : outputs;
}

#ifdef FASTALEX_WITHOUT_CUDA
OnDevice::OnDevice(const Tensor&) {}
#else
OnDevice::OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
  if (!aoti_torch_get_current_cuda_stream)
    throw std::runtime_error("fastalex: this torch was built without CUDA: install one that was");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  stream_ = static_cast<Stream>(stream);
}
#endif

}  // namespace fastalex

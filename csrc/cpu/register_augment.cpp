// fastalex_cpu::augment: the checks that keep its kernel inside its tensors, and the output.
#include <torch/csrc/stable/library.h>

#include "activation.h"
#include "library.h"
#include "require.h"

namespace fastalex::cpu {
namespace {

using torch::headeronly::ScalarType;

int32_t output_dtype(int64_t dtype) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat32:
      return aoti_torch_dtype_float32();
    case DType::kBFloat16:
      return aoti_torch_dtype_bfloat16();
    case DType::kFloat16:
      return aoti_torch_dtype_float16();
    default:
      fail("augment makes float32, bfloat16 and float16");
  }
}

// Contiguous, of the given type and sizes; images alone may have strides.
Tensor checked(const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> sizes) {
  require(tensor.is_cpu() && tensor.scalar_type() == type &&
              tensor.dim() == static_cast<int64_t>(sizes.size()),
          "augment got a tensor of another type, rank or device");
  int64_t d = 0;
  for (const int64_t size : sizes) {
    require(tensor.sizes()[d++] == size, "augment got a tensor of another size");
  }
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

bool has_dense_rows(const Tensor& images) {
  const auto sizes = images.sizes(), strides = images.strides();
  return (sizes[3] == 1 || strides[3] == 1) && (sizes[2] == 1 || strides[2] == sizes[3]);
}

Tensor augment(const Tensor& images, const Tensor& corners, const Tensor& mirrored,
               const Tensor& shift, const Tensor& mean, int64_t height, int64_t width, double scale,
               int64_t pitch, int64_t dtype) {
  require(images.is_cpu() && images.scalar_type() == ScalarType::Byte && images.dim() == 4,
          "augment takes uint8 [N, H, W, C] on the CPU");
  const Tensor x = has_dense_rows(images) ? images : torch::stable::contiguous(images);
  const int64_t n = x.sizes()[0], h = x.sizes()[1], w = x.sizes()[2], c = x.sizes()[3];
  require(height > 0 && width > 0 && height <= h && width <= w && pitch >= width, "a crop of ",
          height, "x", width, " does not fit ", h, "x", w, " or its pitch ", pitch);
  const Tensor at = checked(corners, ScalarType::Long, {n, 2});
  const Tensor flips = checked(mirrored, ScalarType::Bool, {n});
  const Tensor shifts = checked(shift, ScalarType::Float, {n, c});
  const bool mean_is_image = mean.dim() == 3;
  const Tensor means = mean_is_image ? checked(mean, ScalarType::Float, {h, w, c})
                                     : checked(mean, ScalarType::Float, {c});
  const auto* corner = static_cast<const int64_t*>(at.data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    require(corner[2 * i] >= 0 && corner[2 * i] <= h - height && corner[2 * i + 1] >= 0 &&
                corner[2 * i + 1] <= w - width,
            "augment's corners must lie between 0 and [", h - height, ", ", w - width,
            "] for crops of ", height, "x", width, " in images of ", h, "x", w);
  }
  const int64_t sizes[] = {n, c, height, pitch};
  const Activation out = create(output_dtype(dtype), Sizes(sizes, 4), true);
  if (out.tensor.numel() > 0) {
    kernels().augment(
        {static_cast<DType>(dtype), static_cast<const uint8_t*>(x.data_ptr()), n, h, w, c,
         x.strides()[0], x.strides()[1], corner, static_cast<const bool*>(flips.data_ptr()),
         static_cast<const float*>(shifts.data_ptr()), static_cast<const float*>(means.data_ptr()),
         mean_is_image, static_cast<float>(scale), out.map.data, height, width, pitch});
  }
  return out.tensor;
}

}  // namespace
}  // namespace fastalex::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastalex_cpu, m) {
  m.def(
      "augment(Tensor images, Tensor corners, Tensor mirrored, Tensor shift, Tensor mean, int "
      "height, int width, "
      "float scale, int pitch, int dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastalex_cpu, CPU, m) {
  m.impl("augment", TORCH_BOX(&fastalex::cpu::augment));
}

// Reads the layout of torch tensors, and allocates results in the same one.
#include "activation.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <exception>
#include <utility>
#include <vector>

#include "kept_memory.h"
#include "poison.h"
#include "require.h"

namespace fastalex::cpu {
namespace {

// Merges dims [first, last] into one where their strides nest; returns false where they don't.
bool fold(const int64_t* sizes, const int64_t* strides, int64_t first, int64_t last, int64_t* size,
          int64_t* stride) {
  *size = sizes[last];
  *stride = strides[last];
  for (int64_t d = last - 1; d >= first; --d) {
    if (sizes[d] != 1 && *size != 1 && strides[d] != *stride * *size) return false;
    if (*size == 1) *stride = strides[d];
    *size *= sizes[d];
  }
  return true;
}

bool describe(const Tensor& tensor, Map* map) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t dims = tensor.dim();
  map->data = tensor.data_ptr();
  map->batch = sizes[0];
  map->channels = sizes[1];
  map->batch_stride = strides[0];
  map->channel_stride = strides[1];
  map->width = sizes[dims - 1];
  map->pixel_stride = strides[dims - 1];
  map->height = 1;
  map->row_stride = map->width * map->pixel_stride;
  if (dims > 3 &&
      !fold(sizes.data(), strides.data(), 2, dims - 2, &map->height, &map->row_stride)) {
    return false;
  }
  const bool one_row = map->height == 1, one_column = map->width == 1;
  const bool dense_plane =
      (one_column || map->pixel_stride == 1) && (one_row || map->row_stride == map->width);
  const bool adjacent_channels = map->channels == 1 || map->channel_stride == 1;
  map->channels_last = !dense_plane;
  if (!dense_plane && !adjacent_channels) return false;
  if (!map->channels_last) {
    map->pixel_stride = 1;
    map->row_stride = map->width;
  }
  return true;
}

// More dims than any activation has.
constexpr size_t kMaxDims = 8;

std::array<int64_t, kMaxDims> dense_strides(Sizes sizes, bool channels_last) {
  std::array<int64_t, kMaxDims> strides{};
  int64_t step = 1;
  if (channels_last) {
    strides[1] = 1;
    step = std::max<int64_t>(sizes[1], 1);
  }
  for (size_t d = sizes.size(); d-- > 0;) {
    if (d == 1 && channels_last) continue;
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  return strides;
}

// Beyond this the size of a result is not exact in double, and its memory not to be had.
constexpr double kMostBytes = 0x1p52;

size_t element_bytes(int32_t dtype) {
  if (dtype == aoti_torch_dtype_uint8()) return 1;
  if (dtype == aoti_torch_dtype_bfloat16() || dtype == aoti_torch_dtype_float16()) return 2;
  if (dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_int32()) return 4;
  return 8;
}

// In memory that comes back to us when torch lets go of the tensor; false where there is not
// enough.
bool create_large(int32_t dtype, Sizes sizes, Sizes strides, size_t bytes,
                  AtenTensorHandle* handle) {
  KeptBlock* block = nullptr;
  try {
    block = take_block(bytes);
  } catch (const std::exception&) {
    return false;
  }
  const auto give_back = [](void*, void* context) {
    give_back_block(static_cast<KeptBlock*>(context));
  };
  const auto failed =
      torch_from_blob(block->buffer.data(), static_cast<int64_t>(sizes.size()), sizes.data(),
                      strides.data(), 0, dtype, aoti_torch_device_type_cpu(), -1, handle,
                      aoti_torch_layout_strided(), nullptr, 0, give_back, block);
  if (failed != 0) give_back_block(block);
  return failed == 0;
}

}  // namespace

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return DType::kFloat32;
    case torch::headeronly::ScalarType::Double:
      return DType::kFloat64;
    case torch::headeronly::ScalarType::BFloat16:
      return DType::kBFloat16;
    case torch::headeronly::ScalarType::Half:
      return DType::kFloat16;
    default:
      fail("the CPU kernels take float32, float64, bfloat16 and float16");
  }
}

int32_t dtype_code(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

Activation read(const Tensor& tensor) {
  require(tensor.is_cpu(), "the CPU kernels take CPU tensors");
  require(tensor.dim() >= 3 && tensor.dim() <= static_cast<int64_t>(kMaxDims),
          "expected [N, C, ...] of 3 to ", kMaxDims, " dims, got ", tensor.dim());
  Activation activation{tensor, {}};
  if (!describe(activation.tensor, &activation.map)) {
    activation.tensor = torch::stable::contiguous(tensor);
    describe(activation.tensor, &activation.map);
  }
  return activation;
}

Activation read_as(const Tensor& tensor, bool channels_last) {
  Activation activation = read(tensor);
  if (activation.map.channels_last == channels_last || tensor.numel() == 0) return activation;
  Activation copy = create(dtype_code(tensor), tensor.sizes(), channels_last);
  torch::stable::copy_(copy.tensor, tensor);
  return copy;
}

bool is_channels_last(const Tensor& tensor) {
  Map map;
  return describe(tensor, &map) && map.channels_last;
}

Tensor dense_weight(const Tensor& weight) {
  const auto sizes = weight.sizes(), strides = weight.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < weight.dim(); ++d) {
    if (sizes[d] != 1) dims.emplace_back(strides[d], sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t step = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != step) return torch::stable::contiguous(weight);
    step *= size;
  }
  return weight;
}

Tensor empty_strided(int32_t dtype, Sizes sizes, Sizes strides) {
  double elements = 1;
  for (size_t d = 0; d < sizes.size(); ++d) elements *= static_cast<double>(sizes[d]);
  const double bytes = elements * element_bytes(dtype);
  AtenTensorHandle handle;
  bool failed = false;
  if (bytes >= kLargeBlock && bytes < kMostBytes) {
    failed = !create_large(dtype, sizes, strides, static_cast<size_t>(bytes), &handle);
  } else {
    failed = aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                      aoti_torch_device_type_cpu(), 0, &handle) != 0;
  }
  require(!failed, "not enough memory for a result of ", elements,
          " elements: make the batch smaller");
  Tensor tensor(handle);
  if (bytes < kLargeBlock && bytes > 0) {
    use_huge_pages(tensor.mutable_data_ptr(), static_cast<size_t>(bytes));
    if (poison_enabled()) std::memset(tensor.mutable_data_ptr(), 0xff, static_cast<size_t>(bytes));
  }
  return tensor;
}

Activation create(int32_t dtype, Sizes sizes, bool channels_last) {
  const auto strides = dense_strides(sizes, channels_last);
  Activation activation{empty_strided(dtype, sizes, Sizes(strides.data(), sizes.size())), {}};
  describe(activation.tensor, &activation.map);
  activation.map.channels_last = channels_last;
  return activation;
}

}  // namespace fastalex::cpu

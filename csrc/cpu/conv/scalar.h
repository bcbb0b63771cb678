// One element of a caller's tensor as float, whatever its type.
#pragma once
#include <cmath>
#include <cstring>

#include "../dtypes.h"

namespace fastalex::cpu::conv {

inline size_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) {
    return float_from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  const float value = float_from_bits(magnitude << 13) * 0x1p112f;  // rebias, subnormals included
  return sign ? -value : value;
}

inline float read_element(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == DType::kBFloat16 ? float_from_bits(static_cast<uint32_t>(bits) << 16)
                                   : half_to_float(bits);
}

inline const void* element_at(const void* data, DType dtype, int64_t index) {
  return static_cast<const char*>(data) + index * static_cast<int64_t>(element_size(dtype));
}

inline void* element_at(void* data, DType dtype, int64_t index) {
  return static_cast<char*>(data) + index * static_cast<int64_t>(element_size(dtype));
}

}  // namespace fastalex::cpu::conv

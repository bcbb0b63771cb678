// Memory that nobody may touch, told to AddressSanitizer where it watches; nothing elsewhere.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define FASTALEX_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTALEX_ADDRESS_SANITIZER
#endif
#endif

#ifdef FASTALEX_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#endif

namespace fastalex::cpu {

#ifdef FASTALEX_ADDRESS_SANITIZER
inline constexpr size_t kRedZone = 64;  // bytes between arrays that share a buffer
inline void forbid(const void* data, size_t bytes) { ASAN_POISON_MEMORY_REGION(data, bytes); }
inline void allow(const void* data, size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(data, bytes); }
#else
inline constexpr size_t kRedZone = 0;
inline void forbid(const void*, size_t) {}
inline void allow(const void*, size_t) {}
#endif

}  // namespace fastalex::cpu

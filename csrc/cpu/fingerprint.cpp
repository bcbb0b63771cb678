// A 128-bit fingerprint of memory, as fast as it can be read: tells whether a weight has changed.
#include <cstring>

#include "op_entries.h"

namespace fastalex::cpu::FASTALEX_ISA {
namespace {

constexpr int kLanes = 8;
constexpr int64_t kStripe = kLanes * sizeof(uint64_t);
constexpr int64_t kStripesPerRound = 16;
constexpr uint64_t kOdd = 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio

uint64_t mixed(uint64_t value) {
  value = (value ^ (value >> 32)) * 0xd6e8feb86659fd93u;
  value = (value ^ (value >> 32)) * 0xd6e8feb86659fd93u;
  return value ^ (value >> 32);
}

}  // namespace

// Each lane sums products of the halves of keyed words, and the words themselves; a key belongs to
// a stripe's place in its round, and between rounds the sums are scrambled, so that order counts.
void fingerprint(const void* data, int64_t bytes, uint64_t* result) {
  uint64_t keys[kStripesPerRound][kLanes], sums[kLanes];
  uint64_t key = kOdd;
  for (auto& stripe : keys) {
    for (uint64_t& k : stripe) k = mixed(key += kOdd);
  }
  for (uint64_t& sum : sums) sum = mixed(key += kOdd) + static_cast<uint64_t>(bytes);
  const auto add = [&](const char* at, const uint64_t* stripe_keys) {
    uint64_t words[kLanes];
    std::memcpy(words, at, kStripe);
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t keyed = words[i] ^ stripe_keys[i];
      sums[i] += words[i] + (keyed & 0xffffffffu) * (keyed >> 32);
    }
  };
  const auto scramble = [&] {
    for (int i = 0; i < kLanes; ++i) {
      sums[i] = (sums[i] ^ (sums[i] >> 47) ^ keys[0][i]) * 0x9e3779b1u;
    }
  };
  const char* at = static_cast<const char*>(data);
  int64_t left = bytes;
  for (; left >= kStripesPerRound * kStripe; left -= kStripesPerRound * kStripe) {
    for (int s = 0; s < kStripesPerRound; ++s, at += kStripe) {
      __builtin_prefetch(at + 4096);
      add(at, keys[s]);
    }
    scramble();
  }
  for (int s = 0; left > 0; ++s, at += kStripe, left -= kStripe) {
    char last[kStripe] = {};
    std::memcpy(last, at, left < kStripe ? left : kStripe);
    add(last, keys[s]);
  }
  result[0] = result[1] = kOdd * static_cast<uint64_t>(bytes);
  for (int i = 0; i < kLanes; ++i) {
    result[0] = mixed(result[0] + sums[i]);
    result[1] = mixed(result[1] ^ (sums[i] * kOdd));
  }
}

}  // namespace fastalex::cpu::FASTALEX_ISA

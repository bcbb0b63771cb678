// Weights in the layout a kernel wants, kept while the weight they were made from is unchanged.
#include "packed.h"

#include <pthread.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

#include "library.h"
#include "parallel.h"

namespace fastalex::cpu {
namespace {

// The least recently used weights give way beyond this: VGG-16's take 420 MB.
constexpr size_t kLimit = size_t{1} << 30;

using Fingerprint = std::array<uint64_t, 2>;
using Key = std::pair<const void*, uint64_t>;  // the weight's address, and the layout

struct Entry {
  Fingerprint content;
  std::shared_ptr<Buffer> buffer;
  size_t bytes;
  uint64_t last_use;
};

std::mutex g_mutex;
std::map<Key, Entry> g_entries;
size_t g_bytes = 0;
uint64_t g_clock = 0;

// A child forked while another thread held the lock would wait for ever.
[[maybe_unused]] const int g_fork_handlers =
    pthread_atfork([] { g_mutex.lock(); }, [] { g_mutex.unlock(); }, [] { g_mutex.unlock(); });

Fingerprint fingerprint_of(WeightBytes weight) {
  constexpr int64_t kChunk = 256 << 10;
  const char* data = static_cast<const char*>(weight.data);
  const int64_t bytes = weight.bytes;
  Fingerprint result;
  if (bytes <= kChunk) {
    kernels().fingerprint(data, bytes, result.data());
    return result;
  }
  std::vector<Fingerprint> chunks((bytes + kChunk - 1) / kChunk);
  parallel_for(static_cast<int64_t>(chunks.size()), 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels().fingerprint(data + i * kChunk, std::min(kChunk, bytes - i * kChunk),
                            chunks[i].data());
    }
  });
  kernels().fingerprint(chunks.data(), static_cast<int64_t>(chunks.size() * sizeof(Fingerprint)),
                        result.data());
  return result;
}

void erase(std::map<Key, Entry>::iterator entry) {
  g_bytes -= entry->second.bytes;
  g_entries.erase(entry);
}

// All but `kept` may go.
void make_room(const Key& kept) {
  while (g_bytes > kLimit && g_entries.size() > 1) {
    auto oldest = g_entries.end();
    for (auto it = g_entries.begin(); it != g_entries.end(); ++it) {
      if (it->first == kept) continue;
      if (oldest == g_entries.end() || it->second.last_use < oldest->second.last_use) oldest = it;
    }
    erase(oldest);
  }
}

// A buffer to pack into: the entry's own unless someone still reads it.
std::shared_ptr<Buffer> take_buffer(const Key& key) {
  const std::lock_guard lock(g_mutex);
  const auto found = g_entries.find(key);
  if (found == g_entries.end()) return nullptr;
  std::shared_ptr<Buffer> buffer = std::move(found->second.buffer);
  erase(found);
  return buffer.use_count() == 1 ? buffer : nullptr;
}

}  // namespace

std::shared_ptr<const Buffer> packed_weight(WeightBytes weight, uint64_t layout, size_t bytes,
                                            void (*pack)(void* context, void* out), void* context) {
  const Key key{weight.data, layout};
  const Fingerprint content = fingerprint_of(weight);
  {
    const std::lock_guard lock(g_mutex);
    const auto found = g_entries.find(key);
    if (found != g_entries.end() && found->second.content == content) {
      found->second.last_use = ++g_clock;
      return found->second.buffer;
    }
  }
  // Packing runs outside the lock: it uses all threads.
  std::shared_ptr<Buffer> buffer = take_buffer(key);
  if (!buffer) buffer = std::make_shared<Buffer>();
  buffer->reserve(bytes);
  pack(context, buffer->data());
  buffer->check();
  // Another thread may have written the weight meanwhile: what was read is then of no content, and
  // serves this call alone.
  if (fingerprint_of(weight) != content) return buffer;
  const std::lock_guard lock(g_mutex);
  if (const auto other = g_entries.find(key); other != g_entries.end()) erase(other);
  g_entries.emplace(key, Entry{content, buffer, buffer->capacity(), ++g_clock});
  g_bytes += buffer->capacity();
  make_room(key);
  return buffer;
}

void release_packed(int64_t address) {
  const void* data = reinterpret_cast<const void*>(address);
  const std::lock_guard lock(g_mutex);
  auto it = g_entries.lower_bound({data, 0});
  while (it != g_entries.end() && it->first.first == data) erase(it++);
}

void release_all_packed() {
  const std::lock_guard lock(g_mutex);
  g_entries.clear();
  g_bytes = 0;
}

int64_t packed_bytes() {
  const std::lock_guard lock(g_mutex);
  return static_cast<int64_t>(g_bytes);
}

int64_t packed_limit() { return static_cast<int64_t>(kLimit); }

}  // namespace fastalex::cpu

// ThreadSanitizer: every threaded path of the CPU library's torch-free parts, on threads it can
// see. Exits with 1 where a result depends on threads.
#include <atomic>
#include <cstdio>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "../../../csrc/cpu/conv_plans.h"
#include "../../../csrc/cpu/kept_memory.h"
#include "../../../csrc/cpu/linear.h"
#include "../../../csrc/cpu/packed.h"
#include "convolution.h"
#include "host.h"

namespace {

using namespace native;
using namespace fastalex::cpu;
using conv::Pass;
using conv::Problem;

std::atomic<int> failures{0};

using Results = std::vector<float>;

void expect_equal(const std::string& what, const Results& have, const Results& want) {
  if (have.size() == want.size() &&
      std::memcmp(have.data(), want.data(), have.size() * sizeof(float)) == 0) {
    return;
  }
  std::fprintf(stderr, "%s: the result depends on threads\n", what.c_str());
  ++failures;
}

Results random_values(int64_t count, uint32_t seed) {
  std::minstd_rand random(seed + 1);
  Results values(count);
  for (float& value : values) value = static_cast<float>(random() % 1000) / 250 - 2;
  return values;
}

// A dense [3, 24, 21, 19]: work for several threads, and partial vectors.
constexpr int64_t kBatch = 3, kChannels = 24, kHeight = 21, kWidth = 19;

Map map_of(const void* data, int64_t height, int64_t width, bool channels_last) {
  Map map{};
  map.data = const_cast<void*>(data);
  map.batch = kBatch, map.channels = kChannels, map.height = height, map.width = width;
  map.batch_stride = kChannels * height * width;
  map.channel_stride = channels_last ? 1 : height * width;
  map.row_stride = channels_last ? kChannels * width : width;
  map.pixel_stride = channels_last ? kChannels : 1;
  map.channels_last = channels_last;
  return map;
}

// Normalization and pooling, forward and backward, in one layout.
Results normalize_and_pool(bool channels_last) {
  const int64_t out_height = (kHeight - 3) / 2 + 1, out_width = (kWidth - 3) / 2 + 1;
  const int64_t in_count = kBatch * kChannels * kHeight * kWidth;
  const int64_t out_count = kBatch * kChannels * out_height * out_width;
  const Results x = random_values(in_count, 1), g = random_values(in_count, 2);
  Results y(in_count), gx(in_count), pooled(out_count), all;
  std::vector<uint8_t> offsets(out_count);
  const auto whole = [&](const void* data) { return map_of(data, kHeight, kWidth, channels_last); };
  const auto small = [&](const void* data) {
    return map_of(data, out_height, out_width, channels_last);
  };
  const auto keep = [&](const Results& values) {
    all.insert(all.end(), values.begin(), values.end());
  };
  const LrnParams lrn{5, 0.1, 0.75, 1, 2};
  const PoolParams pool{3, 3, 2, 2, 0, 0, 1, 1};
  const DType f32 = DType::kFloat32;
  const Kernels& k = kernels();
  k.lrn({f32, lrn, whole(x.data()), whole(y.data())});
  keep(y);
  k.lrn_backward({f32, lrn, whole(g.data()), whole(x.data()), whole(gx.data())});
  keep(gx);
  const MaxPoolCall pooling{f32, pool, whole(x.data()), small(pooled.data()),
                            small(offsets.data())};
  k.max_pool(pooling);
  keep(pooled);
  const MaxPoolBackwardCall unpooling{f32, pool, small(g.data()), small(offsets.data()),
                                      whole(gx.data())};
  k.max_pool_backward(unpooling);
  keep(gx);
  k.lrn_max_pool({lrn, pooling});
  keep(pooled);
  k.lrn_max_pool_backward({lrn, whole(x.data()), unpooling});
  keep(gx);
  return all;
}

Results augment() {
  constexpr int64_t kImages = 6, kSide = 40, kCrop = 33;
  std::vector<uint8_t> images(kImages * kSide * kSide * 3);
  for (size_t i = 0; i < images.size(); ++i) images[i] = static_cast<uint8_t>(i * 7);
  const std::vector<int64_t> corners(2 * kImages, 5);
  const bool mirrored[kImages] = {true, false, true, false, true, false};
  const std::vector<float> shift(3 * kImages, 0.5f), mean(3, 1.0f);
  Results out(kImages * kCrop * kCrop * 3);
  AugmentCall call{};
  call.dtype = DType::kFloat32;
  call.images = images.data();
  call.batch = kImages, call.height = call.width = kSide, call.channels = 3;
  call.batch_stride = kSide * kSide * 3, call.row_stride = kSide * 3;
  call.corners = corners.data(), call.mirrored = mirrored;
  call.shift = shift.data(), call.mean = mean.data();
  call.scale = 1;
  call.output = out.data();
  call.out_height = call.out_width = call.pitch = kCrop;
  kernels().augment(call);
  return out;
}

Results linear(int64_t rows) {
  const int inputs = 150, outputs = 90;
  const Results x = random_values(rows * inputs, 3), w = random_values(inputs * outputs, 4),
                b = random_values(outputs, 5), g = random_values(rows * outputs, 6);
  Results y(rows * outputs), gx(rows * inputs), gw(inputs * outputs), gb(outputs), all;
  const linear::Plan plan(kernels().conv(), {DType::kFloat32, rows, inputs, outputs, true},
                          thread_count());
  {
    const ScratchLease scratch(plan.forward_scratch_bytes());
    plan.forward({x.data(), w.data(), b.data(), y.data(), scratch.data()});
  }
  const ScratchLease scratch(plan.backward_scratch_bytes());
  plan.backward(
      {g.data(), y.data(), x.data(), w.data(), gx.data(), gw.data(), gb.data(), scratch.data()});
  for (const Results* part : {&y, &gx, &gw, &gb}) all.insert(all.end(), part->begin(), part->end());
  return all;
}

Problem problem(int side, int kernel, int stride, int groups) {
  Problem p;
  p.batch = 3;
  p.groups = groups;
  p.in_channels = 20 * groups, p.out_channels = 36 * groups;
  p.in_height = p.in_width = side;
  p.kernel_height = p.kernel_width = kernel;
  p.stride_height = p.stride_width = stride;
  p.padding_height = p.padding_width = kernel / 2;
  return p;
}

// The three passes as csrc/cpu/register_conv.cpp runs them, the weight taken from the cache.
Results convolve(const Problem& p, conv::Engine engine, const Array& weight) {
  const DType f32 = DType::kFloat32;
  Array x(f32, p.batch, p.in_channels, p.in_height, p.in_width, 1);
  Array y(f32, p.batch, p.out_channels, p.out_height(), p.out_width(), 1);
  Array g(f32, p.batch, p.out_channels, p.out_height(), p.out_width(), 0);
  Array gx(f32, p.batch, p.in_channels, p.in_height, p.in_width, 1);
  Array gw(f32, p.out_channels, p.in_channels / p.groups, p.kernel_height, p.kernel_width, 0);
  x.fill(7);
  g.fill(8);
  const auto packed = [&](const conv::Plan& plan) {
    const WeightBytes bytes{weight.data.get(), weight.elements * 4};
    return packed_weight(bytes, plan.packed_key(), plan.packed_bytes(),
                         [&](void* out) { plan.pack(weight.view(), out); });
  };
  {
    const auto plan = plan_for(p, Pass::kForward, engine, 0);
    const auto ready = packed(*plan);
    const ScratchLease scratch(plan->scratch_bytes());
    plan->forward(
        {x.view(), weight.view(), nullptr, ready->data(), y.target(), scratch.data(), {}});
  }
  {
    const auto plan = plan_for(p, Pass::kInputGradient, engine, 0);
    const auto ready = packed(*plan);
    const ScratchLease scratch(plan->scratch_bytes());
    plan->input_gradient(
        {g.view(), y.view(), weight.view(), ready->data(), gx.target(), scratch.data()});
  }
  const auto plan = plan_for(p, Pass::kWeightGradient, engine, 0);
  const ScratchLease scratch(plan->scratch_bytes());
  plan->weight_gradient({g.view(), y.view(), x.view(), gw.target(), nullptr, scratch.data()});
  Results all;
  for (const Array* part : {&y, &gx, &gw}) {
    part->each([&](auto... at) { all.push_back(static_cast<float>(part->read(at...))); });
  }
  return all;
}

Array weight_of(const Problem& p, uint32_t seed) {
  Array weight(DType::kFloat32, p.out_channels, p.in_channels / p.groups, p.kernel_height,
               p.kernel_width, 0);
  weight.fill(seed);
  return weight;
}

// Each operator on one thread, then on four.
void threads_inside() {
  const Problem problems[] = {problem(12, 3, 1, 1), problem(23, 5, 2, 2), problem(9, 1, 1, 1)};
  std::vector<std::pair<std::string, std::function<Results()>>> calls = {
      {"channels last", [] { return normalize_and_pool(true); }},
      {"planes", [] { return normalize_and_pool(false); }},
      {"augment", augment},
      {"linear, few rows", [] { return linear(2); }},
      {"linear, many rows", [] { return linear(70); }},
  };
  for (const Problem& p : problems) {
    for (conv::Engine engine : {conv::Engine::kDirect, conv::Engine::kWinograd}) {
      calls.emplace_back("convolution", [=] { return convolve(p, engine, weight_of(p, 1)); });
    }
  }
  for (const auto& [name, call] : calls) {
    host::threads = 1;
    const Results alone = call();
    host::threads = 4;
    expect_equal(name, call(), alone);
  }
}

// Six threads share two weights and the plans, each changing a third weight of its own and dropping
// packed forms.
void threads_outside() {
  host::threads = 2;
  const Problem p = problem(10, 3, 1, 1), q = problem(10, 5, 1, 1);
  const Array first = weight_of(p, 1), second = weight_of(q, 2);
  const auto engine = conv::Engine::kAuto;
  const Results want_first = convolve(p, engine, first), want_second = convolve(q, engine, second);
  const Results want[] = {convolve(p, engine, weight_of(p, 3)),
                          convolve(p, engine, weight_of(p, 4))};
  std::vector<std::thread> threads;
  for (int index = 0; index < 6; ++index) {
    threads.emplace_back([&, index] {
      Array own = weight_of(p, 3);
      for (int round = 0; round < 4; ++round) {
        expect_equal("a shared weight", convolve(p, engine, first), want_first);
        expect_equal("another", convolve(q, engine, second), want_second);
        own.fill(3 + round % 2);
        expect_equal("a weight changed in place", convolve(p, engine, own), want[round % 2]);
        if (index % 2) release_packed(reinterpret_cast<intptr_t>(first.data.get()));
        if (packed_bytes() < 0) ++failures;
      }
      release_packed(reinterpret_cast<intptr_t>(own.data.get()));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// More than the cache may hold, from four threads at once; what was packed stays whole while it is
// held.
void eviction() {
  std::vector<std::thread> threads;
  for (int index = 0; index < 4; ++index) {
    threads.emplace_back([index] {
      for (uint64_t round = 0; round < 6; ++round) {
        const Results weight = random_values(64, index * 10 + round);
        const size_t bytes = packed_limit() / 3;  // untouched memory costs nothing
        const auto packed = packed_weight({weight.data(), 256}, round, bytes,
                                          [&](void* out) { std::memcpy(out, weight.data(), 256); });
        std::this_thread::yield();
        if (std::memcmp(packed->data(), weight.data(), 256) != 0) ++failures;
        release_packed(reinterpret_cast<intptr_t>(weight.data()));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// A weight that changes while it is packed, as by another thread, and is then as it was: the packed
// form, which is of neither content, is not taken for it.
void changed_while_packed() {
  Results weight = random_values(64, 1);
  const auto pack = [&](bool change) {
    return packed_weight({weight.data(), 256}, 1, 256, [&, change](void* out) {
      if (change) weight[3] += 1;
      std::memcpy(out, weight.data(), 256);
    });
  };
  pack(true);
  weight[3] -= 1;
  if (std::memcmp(pack(false)->data(), weight.data(), 256) != 0) {
    std::fputs("a packed form is stale\n", stderr);
    ++failures;
  }
  release_packed(reinterpret_cast<intptr_t>(weight.data()));
}

}  // namespace

int main() {
  changed_while_packed();
  threads_inside();
  threads_outside();
  eviction();
  std::printf("%d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}

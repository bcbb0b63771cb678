// libFuzzer: plans, packs and runs convolutions that bytes describe, against the definition in
// double; and plans huge ones, for the arithmetic of sizes alone.
#include <cinttypes>
#include <cstdio>
#include <vector>

#include "../support/native/convolution.h"
#include "../support/native/host.h"

namespace {

using namespace native;
using conv::Pass;
using conv::Plan;
using conv::Problem;

// Numbers from the input, zeros once it ends.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint32_t next(int bytes) {
    uint32_t value = 0;
    for (int i = 0; i < bytes; ++i) value = value << 8 | (at_ < size_ ? data_[at_++] : 0);
    return value;
  }
  int between(int low, int high) {
    const uint32_t range = static_cast<uint32_t>(high - low) + 1;
    return low + static_cast<int>(next(range > 256 ? 4 : 1) % range);
  }
  bool flag() { return next(1) & 1; }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

// What csrc/cpu/register_conv.cpp lets through.
bool served(const Problem& p) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  const auto reach = [](int64_t size, int64_t kernel, int64_t padding, int64_t dilation) {
    return dilation * (kernel - 1) + 2 * padding + size < kLimit;
  };
  return reach(p.in_height, p.kernel_height, p.padding_height, p.dilation_height) &&
         reach(p.in_width, p.kernel_width, p.padding_width, p.dilation_width) &&
         conv::refusal(p).empty();
}

Problem problem_of(Bytes& in, int most, int most_kernel, int most_channels) {
  Problem p;
  const DType dtypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  p.dtype = dtypes[in.between(0, 2)];
  p.batch = in.between(0, 3);
  p.groups = in.between(1, 3);
  p.in_channels = p.groups * in.between(1, most_channels);
  p.out_channels = p.groups * in.between(1, most_channels);
  p.in_height = in.between(1, most);
  p.in_width = in.between(1, most);
  p.kernel_height = in.between(1, most_kernel);
  p.kernel_width = in.flag() ? p.kernel_height : in.between(1, most_kernel);
  p.stride_height = in.between(1, 5);
  p.stride_width = in.flag() ? p.stride_height : in.between(1, most);
  p.padding_height = in.between(0, most / 2);
  p.padding_width = in.flag() ? p.padding_height : in.between(0, most / 2);
  p.dilation_height = in.flag() ? 1 : in.between(1, most_kernel);
  p.dilation_width = in.flag() ? p.dilation_height : in.between(1, most_kernel);
  p.relu = in.flag();
  p.precision = static_cast<conv::Precision>(in.between(0, 2));
  return p;
}

[[noreturn]] void fail(const char* what, const Plan& plan, double have, double want) {
  std::fprintf(stderr, "%s is %g, by definition %g; %s\n", what, have, want,
               plan.explain().c_str());
  std::abort();
}

// Direct sums of these integers are exact; a Winograd tile may err by its level's share of the
// largest magnitude.
void compare(const char* what, const Plan& plan, const Problem& p, const Array& array,
             const std::vector<double>& wanted, const std::vector<double>& magnitude) {
  double largest = 0;
  for (double m : magnitude) largest = std::max(largest, m);
  const bool winograd =
      plan.engine() == conv::Engine::kWinograd || p.precision != conv::Precision::kHighest;
  const double share = !winograd ? 0 : p.precision == conv::Precision::kMedium ? 5e-4 : 5e-5;
  const double rounding = p.dtype == DType::kFloat32    ? 0
                          : p.dtype == DType::kBFloat16 ? 1.0 / 256
                                                        : 1.0 / 2048;
  size_t i = 0;
  array.each([&](auto... at) {
    const double have = array.read(at...), want = wanted[i++];
    if (!(std::abs(have - want) <= share * largest * 1.01 + rounding * std::abs(want))) {
      fail(what, plan, have, want);
    }
  });
}

size_t count(const Array& a) { return a.sizes[0] * a.sizes[1] * a.sizes[2] * a.sizes[3]; }
size_t index(const Array& a, int64_t i, int64_t j, int64_t k, int64_t l) {
  return ((i * a.sizes[1] + j) * a.sizes[2] + k) * a.sizes[3] + l;
}

// Sums `first` times `second` over every product into the place that `to` names, with magnitudes.
struct Sums {
  std::vector<double> values, magnitudes;
  explicit Sums(const Array& to) : values(count(to)), magnitudes(count(to)) {}
  void add(size_t at, double product) {
    values[at] += product;
    magnitudes[at] += std::abs(product);
  }
};

void run_small(Bytes& in) {
  const Problem p = problem_of(in, 20, 7, 40);
  if (!served(p)) return;
  const double products = 1.0 * p.batch * p.out_channels * p.out_height() * p.out_width() *
                          (p.in_channels / p.groups) * p.kernel_height * p.kernel_width;
  if (products > 3e5 || p.out_height() > 64 || p.out_width() > 64) return;
  const auto pass = static_cast<Pass>(in.between(0, 2));
  const auto engine = static_cast<conv::Engine>(in.between(0, 2));
  const int tile = in.between(0, 8);
  host::threads = in.between(1, 5);
  host::in_turn = true;

  const int order = in.between(0, 3);
  Array x(p.dtype, p.batch, p.in_channels, p.in_height, p.in_width, order, in.between(0, 2));
  Array w(p.dtype, p.out_channels, p.in_channels / p.groups, p.kernel_height, p.kernel_width,
          in.between(0, 3));
  Array y(p.dtype, p.batch, p.out_channels, p.out_height(), p.out_width(), in.between(0, 3),
          in.between(0, 2));
  Array mask(p.dtype, p.batch, p.out_channels, p.out_height(), p.out_width(), in.between(0, 3));
  Array bias(p.dtype, 1, 1, 1, p.out_channels, 0);
  const bool has_bias = in.flag(), has_mask = in.flag();
  const uint32_t seed = in.next(1);
  w.fill(seed);
  mask.fill(seed + 1);
  bias.fill(seed + 2);

  const Plan plan(fastalex::cpu::kernels().conv(), p, pass, host::threads, engine, tile);
  AlignedBytes packed(plan.packed_bytes()), scratch(plan.scratch_bytes());
  if (pass != Pass::kWeightGradient) plan.pack(w.view(), packed.data);
  if (pass == Pass::kForward) {
    x.fill(seed + 3);
    plan.forward({x.view(),
                  w.view(),
                  has_bias ? bias.data.get() : nullptr,
                  packed.data,
                  y.target(),
                  scratch.data,
                  {}});
    Sums sums(y);
    each_product(p, [&](int64_t n, int k, int i, int j, int c, int r, int s, int ch, int h, int v) {
      sums.add(index(y, n, k, i, j), x.read(n, ch, h, v) * w.read(k, c, r, s));
    });
    y.each([&](int64_t n, int64_t k, int64_t i, int64_t j) {
      double& value = sums.values[index(y, n, k, i, j)];
      if (has_bias) value += bias.read(0, 0, 0, k);
      if (p.relu) value = std::max(value, 0.0);
    });
    return compare("output", plan, p, y, sums.values, sums.magnitudes);
  }
  y.fill(seed + 3);  // the gradient of the output
  const conv::ConstTensor nothing{nullptr, mask.strides};
  const auto gradient = [&](int64_t n, int64_t k, int64_t i, int64_t j) {
    return has_mask && mask.read(n, k, i, j) <= 0 ? 0 : y.read(n, k, i, j);
  };
  if (pass == Pass::kInputGradient) {
    plan.input_gradient({y.view(), has_mask ? mask.view() : nothing, w.view(), packed.data,
                         x.target(), scratch.data});
    Sums sums(x);
    each_product(p, [&](int64_t n, int k, int i, int j, int c, int r, int s, int ch, int h, int v) {
      sums.add(index(x, n, ch, h, v), gradient(n, k, i, j) * w.read(k, c, r, s));
    });
    return compare("gradient of the input", plan, p, x, sums.values, sums.magnitudes);
  }
  x.fill(seed + 4);
  Array dw(p.dtype, p.out_channels, p.in_channels / p.groups, p.kernel_height, p.kernel_width,
           in.between(0, 3));
  plan.weight_gradient({y.view(), has_mask ? mask.view() : nothing, x.view(), dw.target(),
                        has_bias ? bias.data.get() : nullptr, scratch.data});
  Sums sums(dw), bias_sums(bias);
  each_product(p, [&](int64_t n, int k, int i, int j, int c, int r, int s, int ch, int h, int v) {
    sums.add(index(dw, k, c, r, s), gradient(n, k, i, j) * x.read(n, ch, h, v));
  });
  compare("gradient of the weight", plan, p, dw, sums.values, sums.magnitudes);
  if (!has_bias) return;
  y.each(
      [&](int64_t n, int64_t k, int64_t i, int64_t j) { bias_sums.add(k, gradient(n, k, i, j)); });
  compare("gradient of the bias", plan, p, bias, bias_sums.values, bias_sums.magnitudes);
}

void plan_large(Bytes& in) {
  const int bits = in.between(5, 29);
  Problem p = problem_of(in, 1 << bits, 1 << in.between(1, 20), 1 << in.between(0, 24));
  p.batch = in.next(4);
  if (p.stride_height > 64 || p.stride_width > 64 || !served(p)) return;
  const auto pass = static_cast<Pass>(in.between(0, 2));
  const Plan plan(fastalex::cpu::kernels().conv(), p, pass, in.between(1, 64),
                  static_cast<conv::Engine>(in.between(0, 2)), in.between(0, 8));
  constexpr size_t kMost = size_t{1} << 62;
  if (plan.packed_bytes() > kMost || plan.scratch_bytes() > kMost || plan.explain().empty()) {
    std::fprintf(stderr, "%zu packed, %zu scratch\n", plan.packed_bytes(), plan.scratch_bytes());
    std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  in.next(1) % 4 == 0 ? plan_large(in) : run_small(in);
  return 0;
}

#ifdef FASTALEX_REPLAY
// The files named, one after another, where there is no libFuzzer.
int main(int count, char** names) {
  for (int i = 1; i < count; ++i) {
    std::FILE* file = std::fopen(names[i], "rb");
    if (!file) return 1;
    uint8_t data[4096];
    const size_t size = std::fread(data, 1, sizeof(data), file);
    std::fclose(file);
    LLVMFuzzerTestOneInput(data, size);
  }
  std::printf("%d inputs\n", count - 1);
}
#endif

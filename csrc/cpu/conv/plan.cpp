// From a convolution to parts: phases, candidate engines, and the cheapest of them.
#include <algorithm>
#include <cstdio>
#include <numeric>

#include "cost.h"
#include "part.h"

namespace fastalex::cpu::conv {
namespace {

Geometry forward_geometry(const Problem& p) {
  Geometry g;
  g.images = p.batch;
  g.groups = p.groups;
  g.channels = p.in_channels / p.groups;
  g.filters = p.out_channels / p.groups;
  g.height = p.in_height;
  g.width = p.in_width;
  g.out_height = p.out_height();
  g.out_width = p.out_width();
  g.kernel_h = p.kernel_height;
  g.kernel_w = p.kernel_width;
  g.stride_h = p.stride_height;
  g.stride_w = p.stride_width;
  g.dilation_h = p.dilation_height;
  g.dilation_w = p.dilation_width;
  g.offset_h = p.padding_height;
  g.offset_w = p.padding_width;
  return g;
}

WeightMap forward_weights(const Problem& p) {
  WeightMap map;
  map.rows = {0, 1, p.kernel_height};
  map.columns = {0, 1, p.kernel_width};
  map.group_filters = p.out_channels / p.groups;
  map.group_channels = p.in_channels / p.groups;
  return map;
}

// One dimension of an input gradient, for the inputs congruent to `phase` modulo the stride: they
// are a stride-1 correlation of the output gradient with every `step`-th tap, flipped.
struct PhaseDimension {
  TapRange taps;
  int dilation, offset, count;
};

PhaseDimension input_phase(int phase, int size, int taps, int stride, int padding, int dilation) {
  const int step = stride / std::gcd(stride, dilation);
  // Taps reach the same phases again after `step` of them.
  int first = 0;
  const int distinct = std::min(taps, step);
  while (first < distinct && (phase + padding - int64_t{first} * dilation) % stride != 0) ++first;
  if (first == distinct) first = taps;
  PhaseDimension d;
  const int count = first < taps ? (taps - 1 - first) / step + 1 : 0;
  d.count = (size - phase + stride - 1) / stride;
  d.dilation = step * dilation / stride;
  if (count == 0) {
    d.taps = {0, 1, 0};
    d.dilation = 1;
    d.offset = 0;
    return d;
  }
  const int shift = (phase + padding - first * dilation) / stride;
  d.offset = (count - 1) * d.dilation - shift;
  d.taps = {first + (count - 1) * step, -step, count};
  return d;
}

Part input_gradient_part(const Problem& p, int phase_h, int phase_w) {
  const PhaseDimension rows = input_phase(phase_h, p.in_height, p.kernel_height, p.stride_height,
                                          p.padding_height, p.dilation_height);
  const PhaseDimension columns = input_phase(phase_w, p.in_width, p.kernel_width, p.stride_width,
                                             p.padding_width, p.dilation_width);
  Part part;
  Geometry& g = part.geometry;
  g.images = p.batch;
  g.groups = p.groups;
  g.channels = p.out_channels / p.groups;
  g.filters = p.in_channels / p.groups;
  g.height = p.out_height();
  g.width = p.out_width();
  g.out_height = rows.count;
  g.out_width = columns.count;
  // A phase that no tap reaches is all zeros.
  const bool reached = rows.taps.count > 0 && columns.taps.count > 0;
  g.kernel_h = reached ? rows.taps.count : 0;
  g.kernel_w = reached ? columns.taps.count : 0;
  g.dilation_h = rows.dilation;
  g.dilation_w = columns.dilation;
  g.offset_h = rows.offset;
  g.offset_w = columns.offset;
  part.weights.transposed = true;
  part.weights.rows = rows.taps;
  part.weights.columns = columns.taps;
  part.weights.group_filters = p.out_channels / p.groups;
  part.weights.group_channels = p.in_channels / p.groups;
  part.phase = {phase_h, phase_w, p.stride_height, p.stride_width};
  return part;
}

// The part with its convolution folded to stride 1, space to depth.
Part folded(const Part& part) {
  const Geometry& g = part.geometry;
  const int s = g.stride_h;
  Part out;
  out.weights = part.weights;
  out.weights.fold = s;
  out.phase = part.phase;
  out.fold = {s, g.offset_h, g.offset_w, g.height, g.width, g.channels};
  out.geometry = g;
  Geometry& f = out.geometry;
  f.channels = s * s * g.channels;
  f.kernel_h = static_cast<int>(ceil_div(g.kernel_h, s));
  f.kernel_w = static_cast<int>(ceil_div(g.kernel_w, s));
  f.stride_h = f.stride_w = 1;
  f.offset_h = f.offset_w = 0;
  f.height = g.out_height + f.kernel_h - 1;
  f.width = g.out_width + f.kernel_w - 1;
  return out;
}

Part unfolded(const Part& part) {
  Part out;
  out.geometry = part.geometry;
  out.weights = part.weights;
  out.phase = part.phase;
  return out;
}

// The exact cover of `size` with the fewest small tiles, or no tiles at all.
Cover exact_cover(int size, int big) {
  for (int small = 0; small * (big - 1) <= size && small < big; ++small) {
    const int rest = size - small * (big - 1);
    if (rest % big == 0) return {rest / big, small};
  }
  return {0, 0};
}

// Tiles whose error stays under 1e-5 relative and 5e-5 of the largest output.
bool accurate(int taps, int big) { return !(taps == 3 && big == 7) && !(taps == 5 && big == 5); }

bool winograd_fits(const ConvKernels& kernels, Part& part, int big) {
  const Geometry& g = part.geometry;
  if (g.stride_h != 1 || g.stride_w != 1 || g.dilation_h != 1 || g.dilation_w != 1 ||
      g.kernel_h != g.kernel_w) {
    return false;
  }
  part.winograd.kernels = kernels.winograd(g.kernel_h, big);
  if (!part.winograd.kernels) return false;
  part.winograd.rows = exact_cover(g.out_height, big);
  part.winograd.columns = exact_cover(g.out_width, big);
  return part.winograd.rows.tiles() > 0 && part.winograd.columns.tiles() > 0;
}

struct Request {
  const ConvKernels& kernels;
  Pass pass;
  Precision precision;
  int threads;
  Engine engine;
  int tile;
  bool by_image, pairs;
};

void finish(const Request& request, Part& part) {
  part.by_image = request.by_image;
  const bool gradient = request.pass == Pass::kWeightGradient;
  if (part.engine == Engine::kWinograd) {
    (gradient ? block_winograd_gradient : block_winograd)(request.kernels, part, request.threads);
  } else {
    (gradient ? block_direct_gradient : block_direct)(request.kernels, part, request.threads);
  }
  part.predicted_seconds = predict_seconds(request.kernels, part, request.threads);
}

void consider_winograd(const Request& request, const Part& base, Part& best) {
  constexpr int kSmallestBig = 3, kLargestBig = 7;
  for (int big = kSmallestBig; big <= kLargestBig; ++big) {
    if (request.tile != 0 && request.tile != big) continue;
    const Geometry& g = base.geometry;
    // Folded by a stride that the kernel does not exceed, one tap would be left.
    const bool strided = g.stride_h > 1 && g.stride_h == g.stride_w && g.kernel_h > g.stride_h &&
                         request.pass != Pass::kInputGradient;
    Part candidate = strided ? folded(base) : unfolded(base);
    candidate.engine = Engine::kWinograd;
    if (!winograd_fits(request.kernels, candidate, big)) continue;
    if (request.precision != Precision::kMedium && !accurate(candidate.geometry.kernel_h, big)) {
      continue;
    }
    finish(request, candidate);
    const bool forced = request.engine == Engine::kWinograd && best.engine == Engine::kDirect;
    if (forced || candidate.predicted_seconds < best.predicted_seconds) {
      candidate.fallback = std::make_unique<Part>(unfolded(base));
      finish(request, *candidate.fallback);
      best = std::move(candidate);
    }
  }
}

// Sums of pairs in place of sums of channels.
void pair_channels(Part& part) {
  part.pairs = true;
  part.geometry.channels /= 2;
}

// Decided as if for a fixed number of threads and a whole output: neither changes the results, or
// which weights are packed.
Part choose(const Request& actual, const Part& base) {
  constexpr int kPlanningThreads = 2;
  Request request = actual;
  request.threads = kPlanningThreads;
  request.by_image = false;
  Part best = unfolded(base);
  best.engine = Engine::kDirect;
  if (request.pairs) pair_channels(best);
  finish(request, best);
  const bool allowed =
      request.precision != Precision::kHighest && request.engine != Engine::kDirect;
  if (allowed && base.geometry.images > 0) consider_winograd(request, base, best);
  finish(actual, best);
  if (best.fallback) finish(actual, *best.fallback);
  return best;
}

}  // namespace

std::string refusal(const Problem& p) {
  if (p.dtype == DType::kFloat64) return "float64 is served by the reference";
  if (p.out_height() < 1 || p.out_width() < 1) return "the output is empty";
  const double filter = 1.0 * p.in_channels / p.groups * p.kernel_height * p.kernel_width;
  if (filter >= 1 << 30) return "a filter has 2^30 weights or more: split it into groups";
  // What follows multiplies these by bytes, threads and tile points in 64 bits.
  constexpr double kImage = 1ll << 40, kBatch = 1ll << 50;
  const double input = 1.0 * p.in_channels * (p.in_height + 2 * p.padding_height) *
                       (p.in_width + 2 * p.padding_width);
  const double output = 1.0 * p.out_channels * p.out_height() * p.out_width();
  const double image = std::max(input, output);
  if (image >= kImage) return "a padded image, or its result, has 2^40 elements or more: pad less";
  if (image * p.batch >= kBatch)
    return "a padded batch, or its result, has 2^50 elements or more: split the batch";
  return "";
}

Plan::Plan(const ConvKernels& kernels, const Problem& problem, Pass pass, int threads,
           Engine engine, int tile)
    : kernels_(&kernels), problem_(problem), pass_(pass), threads_(std::max(1, threads)) {
  const Request request{kernels,
                        pass,
                        problem.precision,
                        threads_,
                        engine,
                        tile,
                        problem.by_image && pass == Pass::kForward,
                        problem.pairs && pass == Pass::kForward && kernels.has_pairs()};
  if (pass == Pass::kInputGradient) {
    for (int h = 0; h < std::min(problem.stride_height, problem.in_height); ++h) {
      for (int w = 0; w < std::min(problem.stride_width, problem.in_width); ++w) {
        parts_.push_back(choose(request, input_gradient_part(problem, h, w)));
      }
    }
  } else {
    Part base;
    base.geometry = forward_geometry(problem);
    base.weights = forward_weights(problem);
    parts_.push_back(choose(request, base));
  }
  size_t offset = 0;
  for (Part& part : parts_) {
    part.packed_offset = offset;
    offset += part.packed_bytes;
  }
}

Plan::Plan(Plan&&) noexcept = default;
Plan& Plan::operator=(Plan&&) noexcept = default;
Plan::~Plan() = default;

size_t Plan::packed_bytes() const {
  return parts_.back().packed_offset + parts_.back().packed_bytes;
}

size_t Plan::scratch_bytes() const {
  size_t bytes = kAlignment;
  for (const Part& part : parts_) bytes = std::max(bytes, part.scratch_bytes);
  return bytes;
}

uint64_t Plan::packed_key() const {
  uint64_t key = 0xcbf29ce484222325u;
  const auto mix = [&](uint64_t value) { key = (key ^ value) * 0x100000001b3u; };
  mix(kernels_->lanes);
  mix(static_cast<uint64_t>(pass_));
  for (const Part& part : parts_) {
    const Geometry& g = part.geometry;
    const WeightMap& w = part.weights;
    for (int value : {g.groups, g.channels, g.filters, g.kernel_h, g.kernel_w, w.rows.first,
                      w.rows.step, w.columns.first, w.columns.step}) {
      mix(static_cast<uint64_t>(value));
    }
    mix(part.engine == Engine::kWinograd ? part.winograd.kernels->big : 0);
    mix(part.fold.factor);
    mix(part.pairs);
  }
  return key;
}

double Plan::predicted_seconds() const {
  double seconds = 0;
  for (const Part& part : parts_) seconds += part.predicted_seconds;
  return seconds;
}

Engine Plan::engine() const { return parts_.front().engine; }

int Plan::tile() const {
  return engine() == Engine::kWinograd ? parts_.front().winograd.kernels->big : 0;
}

std::string Plan::explain() const {
  std::string text;
  char line[256];
  for (const Part& part : parts_) {
    const Geometry& g = part.geometry;
    const double gflop = (part.pairs ? 2 : 1) * g.flops() * 1e-9;
    if (part.engine == Engine::kWinograd) {
      const WinogradChoice& w = part.winograd;
      const int big = w.kernels->big;
      std::snprintf(line, sizeof(line),
                    "winograd F(%d,%d)+F(%d,%d), rows %dx%d+%dx%d, columns %dx%d+%dx%d, fold %d, "
                    "%s blocks of %lld images x %d tile rows; ",
                    big, g.kernel_h, big - 1, g.kernel_h, w.rows.big, big, w.rows.small, big - 1,
                    w.columns.big, big, w.columns.small, big - 1, part.fold.factor,
                    w.schedule == Schedule::kPrivate ? "private" : "shared",
                    static_cast<long long>(w.images_per_block), w.rows_per_block);
    } else {
      std::snprintf(line, sizeof(line), "direct%s, bands of %d rows, %d terms a pass, %d splits; ",
                    part.pairs ? " by pairs of bfloat16" : "", part.direct.rows_per_band,
                    part.direct.terms_per_pass, part.direct.filter_splits);
    }
    text += line;
    std::snprintf(line, sizeof(line),
                  "%.3f GFLOP direct, predicted %.3f ms, packed %.2f MB, scratch %.2f MB\n", gflop,
                  part.predicted_seconds * 1e3, part.packed_bytes / 1e6, part.scratch_bytes / 1e6);
    text += line;
  }
  return text;
}

void Plan::pack(const ConstTensor& weight, void* packed) const {
  for (const Part& part : parts_) {
    float* out = reinterpret_cast<float*>(static_cast<char*>(packed) + part.packed_offset);
    if (part.engine == Engine::kWinograd) {
      pack_winograd(*kernels_, part, problem_.dtype, weight, out);
    } else {
      pack_direct(*kernels_, part, problem_.dtype, weight, out);
    }
  }
}

namespace {

void run_part(const ConvKernels& kernels, const Part& part, Operands operands, const void* packed) {
  operands.packed =
      reinterpret_cast<const float*>(static_cast<const char*>(packed) + part.packed_offset);
  if (part.engine == Engine::kWinograd) {
    run_winograd(kernels, part, operands);
  } else {
    run_direct(kernels, part, operands);
  }
}

}  // namespace

void Plan::forward(const ForwardCall& call) const {
  if (problem_.batch == 0) return;
  Operands operands{};
  operands.dtype = problem_.dtype;
  operands.input = call.input;
  operands.weight = call.weight;
  operands.output = call.output;
  operands.bias = call.bias;
  operands.relu = problem_.relu;
  operands.sink = call.sink;
  operands.residual = call.residual;
  operands.prologue = call.prologue;
  operands.scratch = static_cast<char*>(call.scratch);
  operands.threads = threads_;
  for (const Part& part : parts_) run_part(*kernels_, part, operands, call.packed);
}

void Plan::input_gradient(const InputGradientCall& call) const {
  if (problem_.batch == 0) return;
  Operands operands{};
  operands.dtype = problem_.dtype;
  operands.input = call.gradient;
  operands.mask = call.output;
  operands.weight = call.weight;
  operands.output = call.input_gradient;
  operands.relu = false;
  operands.scratch = static_cast<char*>(call.scratch);
  operands.threads = threads_;
  for (const Part& part : parts_) run_part(*kernels_, part, operands, call.packed);
}

void Plan::weight_gradient(const WeightGradientCall& call) const {
  GradientOperands operands{};
  operands.dtype = problem_.dtype;
  operands.input = call.input;
  operands.gradient = call.gradient;
  operands.mask = call.output;
  operands.weight_gradient = call.weight_gradient;
  operands.bias_gradient = call.bias_gradient;
  operands.scratch = static_cast<char*>(call.scratch);
  operands.threads = threads_;
  const Part& part = parts_.front();
  if (part.engine == Engine::kWinograd) {
    run_winograd_weight_gradient(*kernels_, part, operands);
  } else {
    run_direct_weight_gradient(*kernels_, part, operands);
  }
}

}  // namespace fastalex::cpu::conv

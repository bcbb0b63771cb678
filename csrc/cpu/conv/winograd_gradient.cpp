// Weight and bias gradients as the exact adjoint of the Winograd engine:
//   dw = G^T (sum over tiles of (B^T x B) . (A dy A^T)) G
// Big and small tiles add into one sum per point, because their point sets nest. The bias gradient
// is the sum of one point, the one at (1, 1), where A's row is all ones.
#include <array>
#include <atomic>
#include <vector>

#include "arena.h"
#include "gradient.h"
#include "winograd.h"
#include "workers.h"

namespace fastalex::cpu::conv {
namespace {

// Tiles whose gradients of one panel stay in L1 while all channels pass by. Sums are rounded into
// memory once per run of this many, in an order that no number of threads changes.
constexpr int64_t kTilesPerRun = 160;
constexpr int kOnePoint = 2;  // infinity, 0, 1, ...

struct Memory {
  float* zeros;
  float* v;   // [group] PointLayout of channel blocks
  float* d;   // [group][panel] PointLayout of one panel
  float* du;  // [group][point][panel][channel][panel width]
  float* db;  // [group][padded filters]
  char* workers;
  size_t worker_bytes, total_bytes;
  ptrdiff_t v_floats, d_floats;

  Memory(const Part& part, const Panels& panels, char* base, int threads) : part_(part) {
    const Geometry& g = part.geometry;
    const WinogradChoice& choice = part.winograd;
    const TileBlock block{0, choice.images_per_block, 0, choice.rows.tiles()};
    const int points = choice.kernels->points * choice.kernels->points;
    v_floats = PointLayout(choice, block, int64_t{channel_blocks(g)} * kBlock).total();
    d_floats = PointLayout(choice, block, panels.width()).total();
    staging_floats_ = int64_t{choice.kernels->big} * g.out_width * g.filters;
    Arena arena(base);
    zeros = arena.take(zero_row_floats(g));
    v = arena.take(g.groups * v_floats);
    d = arena.take(g.groups * panels.count() * d_floats);
    du = arena.take(int64_t{g.groups} * points * g.channels * panels.padded());
    db = arena.take(int64_t{g.groups} * panels.padded());
    workers = base ? base + arena.bytes() : nullptr;
    Arena measure;
    window(measure), staging(measure);
    worker_bytes = measure.bytes();
    total_bytes = arena.bytes() + threads * worker_bytes;
  }

  struct Worker {
    float* window;
    float* staging;
  };
  Worker worker(int index) const {
    Arena arena(workers + index * worker_bytes);
    float* rows = window(arena);
    return {rows, staging(arena)};
  }

 private:
  float* window(Arena& arena) const { return arena.take(window_floats(part_)); }
  float* staging(Arena& arena) const { return arena.take(staging_floats_); }

  const Part& part_;
  int64_t staging_floats_;
};

class GradientRun {
 public:
  GradientRun(const ConvKernels& kernels, const Part& part, const GradientOperands& operands)
      : kernels_(kernels),
        part_(part),
        operands_(operands),
        geometry_(part.geometry),
        choice_(part.winograd),
        points_(choice_.kernels->points),
        panels_{part.geometry.filters, kernels.lanes},
        gradient_geometry_(gradient_geometry(part.geometry)),
        source_(kernels, part.geometry, part.fold, operands.dtype, operands.input, {}),
        gradient_(kernels, gradient_geometry_, no_fold_, operands.dtype, operands.gradient,
                  operands.mask),
        memory_(part, panels_, operands.scratch, operands.threads),
        transform_(part, source_, memory_.zeros) {
    std::fill_n(memory_.zeros, zero_row_floats(geometry_), 0.0f);
  }

  // False when a sum met NaN or infinity, which the transforms would have spread.
  bool run() {
    for (int64_t begin = 0; begin < geometry_.images; begin += choice_.images_per_block) {
      const int64_t images = std::min(choice_.images_per_block, geometry_.images - begin);
      const TileBlock block{begin, images, 0, choice_.rows.tiles()};
      transform(block);
      multiply(block, begin > 0);
    }
    finish();
    return finite_.load();
  }

 private:
  void transform(const TileBlock& block) {
    const int rows = choice_.rows.tiles(), groups = geometry_.groups;
    const PointLayout v_layout(choice_, block, int64_t{channel_blocks(geometry_)} * kBlock);
    run_jobs(block.images * groups * rows, operands_.threads, [&](int worker, int64_t job) {
      const int row = static_cast<int>(job % rows);
      const int group = static_cast<int>(job / rows % groups);
      const int64_t image = job / rows / groups;
      const Memory::Worker w = memory_.worker(worker);
      RowWindow window(source_, geometry_, w.window, points_, channel_blocks(geometry_) * kBlock);
      transform_.row(v_layout, block, image, group, row, 0, channel_blocks(geometry_), window,
                     memory_.v + group * memory_.v_floats);
      transform_gradient(block, image, group, row, w);
    });
  }

  // A dy A^T of one tile row, all panels of filters.
  void transform_gradient(const TileBlock& block, int64_t image, int group, int row,
                          const Memory::Worker& w) const {
    const int y = tile_position(choice_.rows, choice_.kernels->big, row);
    const bool big = row < choice_.rows.big;
    const int rows = choice_.kernels->big - (big ? 0 : 1);
    const int64_t source_image = block.image_begin + image;
    GradientRowCall call{};
    const float* pixels;
    if (gradient_.in_place()) {
      pixels = gradient_.pixel(source_image, group, y);
      call.pixel_stride = gradient_.pixel_stride();
      call.row_stride = gradient_.row_stride();
    } else {
      pixels = w.staging;
      call.pixel_stride = geometry_.filters;
      call.row_stride = int64_t{geometry_.out_width} * geometry_.filters;
      for (int i = 0; i < rows; ++i) {
        gradient_.read_pixels(source_image, group, y + i, 0, geometry_.out_width,
                              w.staging + i * call.row_stride);
      }
    }
    call.columns = choice_.columns;
    call.big_row = big;
    std::array<float*, kMaxPoints * kMaxPoints> streams;
    call.points = streams.data();
    for (int panel = 0; panel < panels_.count(); ++panel) {
      const int64_t width = int64_t{panels_.vectors(panel)} * kernels_.lanes;
      const PointLayout layout(choice_, block, width);
      float* d = panel_gradient(group, panel);
      for (int p = 0; p < points_ * points_; ++p) {
        streams[p] = d + layout.base(p) + layout.row_tile(p, image, row) * width;
      }
      call.gradient = pixels + panels_.first(panel);
      call.vectors = panels_.vectors(panel);
      call.channels = panels_.valid(panel);
      choice_.kernels->gradient_row(call);
    }
  }

  float* panel_gradient(int group, int panel) const {
    return memory_.d + (int64_t{group} * panels_.count() + panel) * memory_.d_floats;
  }
  float* point_sums(int group, int point, int panel) const {
    const int64_t padded = panels_.padded();
    return memory_.du +
           ((int64_t{group} * points_ * points_ + point) * padded + panels_.first(panel)) *
               geometry_.channels;
  }

  void multiply(const TileBlock& block, bool accumulate) {
    const int count = points_ * points_;
    run_jobs(int64_t{geometry_.groups} * count, operands_.threads, [&](int, int64_t job) {
      const int group = static_cast<int>(job / count), point = static_cast<int>(job % count);
      multiply_point(block, group, point, accumulate);
      if (point == kOnePoint * points_ + kOnePoint) sum_bias(block, group, accumulate);
    });
  }

  // dU[point] (+)= V[point]^T D[point] over the block's tiles, for every panel.
  void multiply_point(const TileBlock& block, int group, int point, bool accumulate) {
    const PointLayout v_layout(choice_, block, int64_t{channel_blocks(geometry_)} * kBlock);
    const int64_t tiles = v_layout.tiles(point);
    const float* v = memory_.v + group * memory_.v_floats + v_layout.base(point);
    for (int64_t first = 0; first < tiles; first += kTilesPerRun) {
      const Segment run{0, static_cast<int>(std::min(kTilesPerRun, tiles - first))};
      for (int panel = 0; panel < panels_.count(); ++panel) {
        const int64_t width = int64_t{panels_.vectors(panel)} * kernels_.lanes;
        const PointLayout d_layout(choice_, block, width);
        OuterCall call{};
        call.step = kBlock;
        call.segments = &run;
        call.segment_count = 1;
        call.b = panel_gradient(group, panel) + d_layout.base(point) + first * width;
        call.vectors = panels_.vectors(panel);
        call.c_stride = width;
        call.accumulate = accumulate || first > 0;
        for (int c = 0; c < geometry_.channels; c += kBlock) {
          call.a = v + c * tiles + first * kBlock;
          call.columns = std::min(kBlock, geometry_.channels - c);
          call.c = point_sums(group, point, panel) + c * width;
          kernels_.outer(call);
        }
      }
    }
    if (tiles == 0 && !accumulate) {
      std::fill_n(point_sums(group, point, 0), int64_t{panels_.padded()} * geometry_.channels,
                  0.0f);
    }
  }

  void sum_bias(const TileBlock& block, int group, bool accumulate) {
    const int point = kOnePoint * points_ + kOnePoint;
    for (int panel = 0; panel < panels_.count(); ++panel) {
      const int64_t width = int64_t{panels_.vectors(panel)} * kernels_.lanes;
      const PointLayout layout(choice_, block, width);
      const float* d = panel_gradient(group, panel) + layout.base(point);
      float* sums = memory_.db + int64_t{group} * panels_.padded() + panels_.first(panel);
      add_rows(d, layout.tiles(point), static_cast<int>(width), accumulate, sums);
    }
  }

  // G^T dU G, and from panels into the caller's layout.
  void finish() {
    const int channels = channel_blocks(geometry_);
    const int64_t per_group = int64_t{panels_.count()} * channels;
    run_jobs(geometry_.groups * per_group, operands_.threads, [&](int, int64_t job) {
      const int group = static_cast<int>(job / per_group);
      const int panel = static_cast<int>(job % per_group / channels);
      const int first = static_cast<int>(job % channels) * kBlock;
      const int last = std::min(first + kBlock, geometry_.channels);
      for (int c = first; c < last; ++c) finish_channel(group, panel, c);
    });
    write_bias_gradient(operands_, panels_, geometry_.groups, memory_.db);
  }

  void finish_channel(int group, int panel, int channel) {
    constexpr int kMaxTaps = 7 * 7, kMaxPanel = 32;
    alignas(kAlignment) float taps[kMaxTaps * kMaxPanel];
    const int vectors = panels_.vectors(panel);
    const int64_t width = int64_t{vectors} * kernels_.lanes;
    choice_.kernels->weight_gradient(point_sums(group, 0, panel) + channel * width,
                                     int64_t{panels_.padded()} * geometry_.channels, vectors, taps);
    if (!write_weight_gradient(part_, operands_, group, panels_.first(panel), panels_.valid(panel),
                               channel, static_cast<int>(width), taps)) {
      finite_.store(false);
    }
  }

  const ConvKernels& kernels_;
  const Part& part_;
  const GradientOperands& operands_;
  const Geometry& geometry_;
  const WinogradChoice& choice_;
  const int points_;
  const Panels panels_;
  const Fold no_fold_;
  const Geometry gradient_geometry_;
  const InputSource source_;
  const InputSource gradient_;
  const Memory memory_;
  const InputTransform transform_;
  std::atomic<bool> finite_{true};
};

}  // namespace

void block_winograd_gradient(const ConvKernels& kernels, Part& part, int threads) {
  constexpr int64_t kBlockBytes = 16 << 20;  // V and D of a block share half a last-level cache
  const Geometry& g = part.geometry;
  WinogradChoice& choice = part.winograd;
  const Panels panels{g.filters, kernels.lanes};
  const TileBlock image{0, 1, 0, choice.rows.tiles()};
  const int64_t floats =
      PointLayout(choice, image, int64_t{channel_blocks(g)} * kBlock + panels.padded()).total();
  const int64_t fitting =
      std::clamp<int64_t>(kBlockBytes / (4 * g.groups * floats), 1, std::max<int64_t>(1, g.images));
  choice.images_per_block =
      ceil_div(std::max<int64_t>(1, g.images), ceil_div(std::max<int64_t>(1, g.images), fitting));
  choice.rows_per_block = choice.rows.tiles();
  choice.schedule = Schedule::kShared;
  part.packed_bytes = 0;
  part.scratch_bytes = Memory(part, panels, nullptr, threads).total_bytes;
}

void run_winograd_weight_gradient(const ConvKernels& kernels, const Part& part,
                                  const GradientOperands& operands) {
  if (GradientRun(kernels, part, operands).run()) return;
  std::vector<char> scratch(part.fallback->scratch_bytes + kAlignment);
  GradientOperands redo = operands;
  const auto address = reinterpret_cast<uintptr_t>(scratch.data());
  redo.scratch = scratch.data() + (kAlignment - address % kAlignment) % kAlignment;
  run_direct_weight_gradient(kernels, *part.fallback, redo);
}

}  // namespace fastalex::cpu::conv

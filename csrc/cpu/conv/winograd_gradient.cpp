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

// Two schedules, by the choice's:
//   shared   all workers transform a block of images, then share out the points; V and D pass
//   through
//            the last-level cache once.
//   private  a worker keeps one group's V and one panel's D in its L2 and adds into the sums of one
//            of a fixed number of partitions of the batch, which are then added in order.
constexpr int kPartitions = 4;

int partitions(const WinogradChoice& choice) {
  return choice.schedule == Schedule::kPrivate ? kPartitions : 1;
}

struct Memory {
  struct Worker {
    float* window;
    float* staging;
    float* v;
    float* d;
  };
  float* zeros;
  float* v;   // [group] PointLayout of channel blocks
  float* d;   // [group][panel] PointLayout of one panel
  float* du;  // [group][partition][point][panel][channel][panel width]
  float* db;  // [group][partition][padded filters]
  char* workers;
  size_t worker_bytes, total_bytes;
  ptrdiff_t v_floats, d_floats;

  Memory(const Part& part, const Panels& panels, char* base, int threads) : part_(part) {
    const Geometry& g = part.geometry;
    const WinogradChoice& choice = part.winograd;
    const TileBlock block{0, choice.images_per_block, 0, choice.rows.tiles()};
    const int64_t points = int64_t{choice.kernels->points} * choice.kernels->points;
    const int64_t slices = int64_t{g.groups} * partitions(choice);
    shared_ = choice.schedule == Schedule::kShared;
    v_floats = PointLayout(choice, block, int64_t{channel_blocks(g)} * kBlock).total();
    d_floats = PointLayout(choice, block, panels.width()).total();
    staging_floats_ = int64_t{choice.kernels->big} * g.out_width * g.filters;
    Arena arena(base);
    zeros = arena.take(zero_row_floats(g));
    v = arena.take(shared_ ? g.groups * v_floats : 0);
    d = arena.take(shared_ ? g.groups * panels.count() * d_floats : 0);
    du = arena.take(slices * points * g.channels * panels.padded());
    db = arena.take(slices * panels.padded());
    workers = base ? base + arena.bytes() : nullptr;
    Arena measure;
    worker(measure);
    worker_bytes = measure.bytes();
    total_bytes = arena.bytes() + threads * worker_bytes;
  }

  Worker worker(int index) const {
    Arena arena(workers + index * worker_bytes);
    return worker(arena);
  }

 private:
  Worker worker(Arena& arena) const {
    Worker w;
    w.window = arena.take(window_floats(part_));
    w.staging = arena.take(staging_floats_);
    w.v = arena.take(shared_ ? 0 : v_floats);
    w.d = arena.take(shared_ ? 0 : d_floats);
    return w;
  }

  const Part& part_;
  bool shared_;
  int64_t staging_floats_;
};

// Where the points of a block lie, in V and in D; computed once per block, not per product.
struct Layouts {
  PointLayout v, whole_panel, last_panel;
  int last;

  Layouts(const WinogradChoice& choice, const Geometry& g, const Panels& panels,
          const TileBlock& block)
      : v(choice, block, int64_t{channel_blocks(g)} * kBlock),
        whole_panel(choice, block, panels.width()),
        last_panel(choice, block, int64_t{panels.vectors(panels.count() - 1)} * panels.lanes),
        last(panels.count() - 1) {}

  const PointLayout& d(int panel) const { return panel == last ? last_panel : whole_panel; }
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
        partitions_(partitions(choice_)),
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
    choice_.schedule == Schedule::kShared ? run_shared() : run_private();
    finish();
    return finite_.load();
  }

 private:
  void run_shared() {
    for (int64_t begin = 0; begin < geometry_.images; begin += choice_.images_per_block) {
      const int64_t images = std::min(choice_.images_per_block, geometry_.images - begin);
      const TileBlock block{begin, images, 0, choice_.rows.tiles()};
      const Layouts layouts(choice_, geometry_, panels_, block);
      transform_shared(block, layouts);
      multiply_shared(layouts, begin > 0);
    }
  }

  void transform_shared(const TileBlock& block, const Layouts& layouts) {
    const int rows = choice_.rows.tiles(), groups = geometry_.groups;
    run_jobs(block.images * groups * rows, operands_.threads, [&](int worker, int64_t job) {
      const int row = static_cast<int>(job % rows);
      const int group = static_cast<int>(job / rows % groups);
      const int64_t image = job / rows / groups;
      const Memory::Worker w = memory_.worker(worker);
      RowWindow window(source_, geometry_, w.window, points_, channel_blocks(geometry_) * kBlock);
      transform_row(block, layouts, image, group, row, window,
                    memory_.v + group * memory_.v_floats);
      const Rows gradient = gradient_rows(block, image, group, row, w.staging);
      for (int panel = 0; panel < panels_.count(); ++panel) {
        transform_gradient(layouts, image, row, panel, gradient, shared_gradient(group, panel));
      }
    });
  }

  void multiply_shared(const Layouts& layouts, bool accumulate) {
    const int count = points_ * points_;
    run_jobs(int64_t{geometry_.groups} * count, operands_.threads, [&](int, int64_t job) {
      const int group = static_cast<int>(job / count), point = static_cast<int>(job % count);
      const float* v = memory_.v + group * memory_.v_floats;
      for (int panel = 0; panel < panels_.count(); ++panel) {
        multiply_point(layouts, point, panel, v, shared_gradient(group, panel),
                       sums(group, 0, point, panel), accumulate);
        if (point != one_point()) continue;
        sum_bias(layouts, panel, shared_gradient(group, panel), bias_sums(group, 0, panel),
                 accumulate);
      }
    });
  }

  void run_private() {
    run_jobs(int64_t{geometry_.groups} * partitions_, operands_.threads,
             [&](int worker, int64_t job) {
               run_partition(static_cast<int>(job) / partitions_,
                             static_cast<int>(job) % partitions_, memory_.worker(worker));
             });
    add_partitions();
  }

  void run_partition(int group, int partition, const Memory::Worker& w) {
    const int64_t first = geometry_.images * partition / partitions_;
    const int64_t last = geometry_.images * (partition + 1) / partitions_;
    for (int64_t begin = first; begin < last; begin += choice_.images_per_block) {
      const int64_t images = std::min(choice_.images_per_block, last - begin);
      run_private_block({begin, images, 0, choice_.rows.tiles()}, group, partition, begin > first,
                        w);
    }
    if (first < last) return;
    std::fill_n(sums(group, partition, 0, 0),
                int64_t{points_} * points_ * panels_.padded() * geometry_.channels, 0.0f);
    std::fill_n(bias_sums(group, partition, 0), panels_.padded(), 0.0f);
  }

  void run_private_block(const TileBlock& block, int group, int partition, bool accumulate,
                         const Memory::Worker& w) {
    const Layouts layouts(choice_, geometry_, panels_, block);
    RowWindow window(source_, geometry_, w.window, points_, channel_blocks(geometry_) * kBlock);
    for (int64_t image = 0; image < block.images; ++image) {
      for (int row = 0; row < block.row_end; ++row) {
        transform_row(block, layouts, image, group, row, window, w.v);
      }
    }
    for (int panel = 0; panel < panels_.count(); ++panel) {
      for (int64_t image = 0; image < block.images; ++image) {
        for (int row = 0; row < block.row_end; ++row) {
          const Rows gradient = gradient_rows(block, image, group, row, w.staging, panel);
          transform_gradient(layouts, image, row, panel, gradient, w.d);
        }
      }
      for (int point = 0; point < points_ * points_; ++point) {
        multiply_point(layouts, point, panel, w.v, w.d, sums(group, partition, point, panel),
                       accumulate);
      }
      sum_bias(layouts, panel, w.d, bias_sums(group, partition, panel), accumulate);
    }
  }

  // Into the first partition's sums, in order.
  void add_partitions() {
    const int count = points_ * points_;
    const int64_t floats = int64_t{panels_.padded()} * geometry_.channels;
    run_jobs(int64_t{geometry_.groups} * count, operands_.threads, [&](int, int64_t job) {
      const int group = static_cast<int>(job / count), point = static_cast<int>(job % count);
      float* total = sums(group, 0, point, 0);
      for (int partition = 1; partition < partitions_; ++partition) {
        const float* part = sums(group, partition, point, 0);
        for (int64_t i = 0; i < floats; ++i) total[i] += part[i];
      }
    });
    for (int group = 0; group < geometry_.groups; ++group) {
      for (int partition = 1; partition < partitions_; ++partition) {
        for (int i = 0; i < panels_.padded(); ++i) {
          bias_sums(group, 0, 0)[i] += bias_sums(group, partition, 0)[i];
        }
      }
    }
  }

  void transform_row(const TileBlock& block, const Layouts& layouts, int64_t image, int group,
                     int row, RowWindow& window, float* v) const {
    transform_.row(layouts.v, block, image, group, row, 0, channel_blocks(geometry_), window, v);
  }

  // The output gradient under one row of tiles, from the filters' first panel on.
  struct Rows {
    const float* data;
    ptrdiff_t pixel_stride, row_stride;
    int first_panel;
  };

  // In the caller's memory if that can be read as it is, else converted into `staging`: all panels,
  // or only the one asked for.
  Rows gradient_rows(const TileBlock& block, int64_t image, int group, int row, float* staging,
                     int only_panel = -1) const {
    const int y = tile_position(choice_.rows, choice_.kernels->big, row);
    const int rows = choice_.kernels->big - (row < choice_.rows.big ? 0 : 1);
    const int64_t source_image = block.image_begin + image;
    if (gradient_.in_place()) {
      return {gradient_.pixel(source_image, group, y), gradient_.pixel_stride(),
              gradient_.row_stride(), 0};
    }
    const bool all = only_panel < 0;
    const int first = all ? 0 : panels_.first(only_panel);
    const int filters = all ? panels_.filters : panels_.valid(only_panel);
    const ptrdiff_t row_stride = int64_t{geometry_.out_width} * filters;
    for (int i = 0; i < rows; ++i) {
      gradient_.read_channels(source_image, group, first, filters, y + i, staging + i * row_stride,
                              filters);
    }
    return {staging, filters, row_stride, all ? 0 : only_panel};
  }

  // A dy A^T of one tile row and panel.
  void transform_gradient(const Layouts& layouts, int64_t image, int row, int panel,
                          const Rows& gradient, float* d) const {
    const int64_t width = int64_t{panels_.vectors(panel)} * kernels_.lanes;
    const PointLayout& layout = layouts.d(panel);
    std::array<float*, kMaxPoints * kMaxPoints> streams;
    for (int p = 0; p < points_ * points_; ++p) {
      streams[p] = d + layout.base(p) + layout.row_tile(p, image, row) * width;
    }
    GradientRowCall call{};
    call.gradient = gradient.data + panels_.first(panel) - panels_.first(gradient.first_panel);
    call.pixel_stride = gradient.pixel_stride;
    call.row_stride = gradient.row_stride;
    call.vectors = panels_.vectors(panel);
    call.channels = panels_.valid(panel);
    call.columns = choice_.columns;
    call.big_row = row < choice_.rows.big;
    call.points = streams.data();
    choice_.kernels->gradient_row(call);
  }

  int one_point() const { return kOnePoint * points_ + kOnePoint; }
  float* shared_gradient(int group, int panel) const {
    return memory_.d + (int64_t{group} * panels_.count() + panel) * memory_.d_floats;
  }
  float* sums(int group, int partition, int point, int panel) const {
    const int64_t slice = int64_t{group} * partitions_ + partition;
    const int64_t filters = (slice * points_ * points_ + point) * panels_.padded();
    return memory_.du + (filters + panels_.first(panel)) * geometry_.channels;
  }
  float* bias_sums(int group, int partition, int panel) const {
    return memory_.db + (int64_t{group} * partitions_ + partition) * panels_.padded() +
           panels_.first(panel);
  }

  // sums (+)= V[point]^T D[point] over the block's tiles, for one panel.
  void multiply_point(const Layouts& layouts, int point, int panel, const float* v, const float* d,
                      float* sums, bool accumulate) const {
    const int64_t width = int64_t{panels_.vectors(panel)} * kernels_.lanes;
    const PointLayout &v_layout = layouts.v, &d_layout = layouts.d(panel);
    const int64_t tiles = v_layout.tiles(point);
    if (tiles == 0 && !accumulate) std::fill_n(sums, geometry_.channels * width, 0.0f);
    for (int64_t first = 0; first < tiles; first += kTilesPerRun) {
      const Segment run{0, static_cast<int>(std::min(kTilesPerRun, tiles - first))};
      OuterCall call{};
      call.step = kBlock;
      call.segments = &run;
      call.segment_count = 1;
      call.b = d + d_layout.base(point) + first * width;
      call.vectors = panels_.vectors(panel);
      call.c_stride = width;
      call.accumulate = accumulate || first > 0;
      for (int c = 0; c < geometry_.channels; c += kBlock) {
        call.a = v + v_layout.base(point) + c * tiles + first * kBlock;
        call.columns = std::min(kBlock, geometry_.channels - c);
        call.c = sums + c * width;
        kernels_.outer(call);
      }
    }
  }

  void sum_bias(const Layouts& layouts, int panel, const float* d, float* sums,
                bool accumulate) const {
    const int64_t width = int64_t{panels_.vectors(panel)} * kernels_.lanes;
    const PointLayout& layout = layouts.d(panel);
    add_rows(d + layout.base(one_point()), layout.tiles(one_point()), static_cast<int>(width),
             accumulate, sums);
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
    if (!operands_.bias_gradient) return;
    for (int group = 0; group < geometry_.groups; ++group) {
      write_bias_gradient(operands_, panels_, group, bias_sums(group, 0, 0));
    }
  }

  void finish_channel(int group, int panel, int channel) {
    constexpr int kMaxTaps = 7 * 7, kMaxPanel = 32;
    alignas(kAlignment) float taps[kMaxTaps * kMaxPanel];
    const int vectors = panels_.vectors(panel);
    const int64_t width = int64_t{vectors} * kernels_.lanes;
    choice_.kernels->weight_gradient(sums(group, 0, 0, panel) + channel * width,
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
  const int points_, partitions_;
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
  // Sums small enough to be revisited for every few images, and V for a worker's L2: private.
  // Otherwise V and D of a block share half a last-level cache.
  constexpr int64_t kPrivateSums = 2 << 20, kPrivateBytes = 1280 << 10, kBlockBytes = 16 << 20;
  const Geometry& g = part.geometry;
  WinogradChoice& choice = part.winograd;
  const Panels panels{g.filters, kernels.lanes};
  const int64_t points = int64_t{choice.kernels->points} * choice.kernels->points;
  const int64_t images = std::max<int64_t>(1, g.images);
  const TileBlock image{0, 1, 0, choice.rows.tiles()};
  const int64_t channels = int64_t{channel_blocks(g)} * kBlock;
  const int64_t v_bytes = 4 * PointLayout(choice, image, channels).total();
  const bool small = 4 * points * g.channels * panels.padded() <= kPrivateSums;
  choice.rows_per_block = choice.rows.tiles();
  if (small && v_bytes <= kPrivateBytes && images * g.groups >= 2 * kPartitions) {
    choice.schedule = Schedule::kPrivate;
    choice.images_per_block =
        std::clamp<int64_t>(kPrivateBytes / v_bytes, 1, ceil_div(images, kPartitions));
  } else {
    choice.schedule = Schedule::kShared;
    const int64_t floats = PointLayout(choice, image, channels + panels.padded()).total();
    const int64_t fitting = std::clamp<int64_t>(kBlockBytes / (4 * g.groups * floats), 1, images);
    choice.images_per_block = ceil_div(images, ceil_div(images, fitting));
  }
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

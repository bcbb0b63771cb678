// The Winograd engine: convolution as one matrix product per point of nested, exactly fitting
// tiles.
#include "winograd.h"

#include <array>

#include "arena.h"
#include "nonfinite.h"
#include "target.h"
#include "workers.h"

namespace fastalex::cpu::conv {

void InputTransform::row(const PointLayout& layout, const TileBlock& block, int64_t image,
                         int group, int row, int block_begin, int block_end, RowWindow& window,
                         float* v) const {
  const Geometry& g = part_.geometry;
  const WinogradChoice& choice = part_.winograd;
  const int points = choice.kernels->points;
  const int count = points * points;
  std::array<float*, kMaxPoints * kMaxPoints> streams;
  std::array<ptrdiff_t, kMaxPoints * kMaxPoints> block_strides;
  for (int p = 0; p < count; ++p) {
    block_strides[p] = layout.tiles(p) * kBlock;
    streams[p] = v + layout.base(p) + block_begin * block_strides[p] +
                 layout.row_tile(p, image, row) * kBlock;
  }
  const bool in_place = source_.in_place() && g.channels % kBlock == 0;
  const bool big = row < choice.rows.big;
  const int first_y = tile_position(choice.rows, choice.kernels->big, row) - g.offset_h;
  const int64_t source_image = block.image_begin + image;
  std::array<const float*, kMaxPoints> rows;
  for (int i = 0; i < points; ++i) {
    const int y = first_y + i;
    if (y < 0 || y >= g.height || (i == points - 1 && !big)) {
      rows[i] = zeros_;
    } else {
      rows[i] =
          (in_place ? source_.pixel(source_image, group, y) : window.row(source_image, group, y)) +
          block_begin * kBlock;
    }
  }
  InputRowCall call{};
  call.rows = rows.data();
  call.width = g.width;
  call.pixel_stride = in_place ? source_.pixel_stride() : channel_blocks(g) * kBlock;
  call.first_column = -g.offset_w;
  call.blocks = block_end - block_begin;
  call.columns = choice.columns;
  call.big_row = big;
  call.points = streams.data();
  call.block_strides = block_strides.data();
  choice.kernels->input_row(call);
}

void multiply_points(const ConvKernels& kernels, const Part& part, const PointProduct& product) {
  constexpr int kBlocksPerPass = 16;  // 256 channels x 32 filters of weights stay in L1
  const Geometry& g = part.geometry;
  const int blocks = channel_blocks(g);
  const int count = part.winograd.kernels->points * part.winograd.kernels->points;
  const ptrdiff_t panel = product.vectors * kernels.lanes;
  std::array<Segment, kBlocksPerPass> segments;
  for (int p = 0; p < count; ++p) {
    const ptrdiff_t block_stride = product.v_layout->tiles(p) * kBlock;
    GemmCall call{};
    product.prefetch.share(p, count).fetch();
    call.row_stride = kBlock;
    call.rows = product.m_layout->tiles(p);
    if (call.rows == 0) continue;
    call.vectors = product.vectors;
    call.c = product.m + product.m_layout->base(p);
    call.c_stride = panel;
    call.segments = segments.data();
    const float* a =
        product.v + product.v_layout->base(p) +
        product.v_layout->row_tile(p, product.first_image, product.block->row_begin) * kBlock;
    for (int first = 0; first < blocks; first += kBlocksPerPass) {
      call.segment_count = std::min(kBlocksPerPass, blocks - first);
      for (int s = 0; s < call.segment_count; ++s) {
        segments[s] = {s * block_stride, std::min(kBlock, g.channels - (first + s) * kBlock)};
      }
      call.a = a + first * block_stride;
      call.b = product.u + (int64_t{p} * g.channels + first * kBlock) * panel;
      call.accumulate = first > 0;
      kernels.gemm(call);
    }
  }
}

namespace {

// The scratch of a run: what is common, V when it is shared, and a slice per worker.
struct Memory {
  struct Worker {
    float* window;
    float* staging;
    float* m;
    float* v;
    float* image;
  };
  float* bias;
  float* zeros;
  float* shared_v;
  char* workers;
  size_t worker_bytes;
  size_t total_bytes;
  ptrdiff_t group_floats;  // of shared_v

  Memory(const Part& part, const Panels& panels, char* base, int threads) : part_(part) {
    const Geometry& g = part.geometry;
    const WinogradChoice& choice = part.winograd;
    const bool shared = choice.schedule == Schedule::kShared;
    const TileBlock block{0, choice.images_per_block, 0, choice.rows_per_block};
    const PointLayout v(choice, block, int64_t{channel_blocks(g)} * kBlock);
    group_floats = v.total();
    v_floats_ = shared ? 0 : v.total();
    m_floats_ = PointLayout(choice, block, panels.width()).total();
    staging_floats_ = int64_t{choice.kernels->big} * g.out_width * panels.width();
    Arena arena(base);
    bias = arena.take(int64_t{g.groups} * panels.padded());
    zeros = arena.take(zero_row_floats(g));
    shared_v = arena.take(shared ? g.groups * group_floats : 0);
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
    w.m = arena.take(m_floats_);
    w.v = arena.take(v_floats_);
    w.image = arena.take(part_.by_image ? image_floats(part_.geometry) : 0);
    return w;
  }

  const Part& part_;
  int64_t v_floats_, m_floats_, staging_floats_;
};

// One flag per tile of a row; on the stack for all but enormous maps.
class TileFlags {
 public:
  explicit TileFlags(int tiles) : tiles_(tiles) {
    if (tiles > kInline) heap_.resize(tiles);
  }
  uint8_t* data() { return tiles_ > kInline ? heap_.data() : inline_.data(); }
  bool any() {
    return std::any_of(data(), data() + tiles_, [](uint8_t f) { return f != 0; });
  }

 private:
  static constexpr int kInline = 256;
  int tiles_;
  std::array<uint8_t, kInline> inline_{};
  std::vector<uint8_t> heap_;
};

// One run of the forward engine (or of an input gradient, which is one on flipped weights).
class WinogradRun {
 public:
  WinogradRun(const ConvKernels& kernels, const Part& part, const Operands& operands)
      : kernels_(kernels),
        part_(part),
        operands_(operands),
        geometry_(part.geometry),
        choice_(part.winograd),
        panels_{part.geometry.filters, kernels.lanes},
        source_(kernels, part.geometry, part.fold, operands.dtype, operands.input, operands.mask,
                operands.prologue),
        target_(kernels, part, operands),
        memory_(part, panels_, operands.scratch, operands.threads),
        transform_(part, source_, memory_.zeros) {
    std::fill_n(memory_.zeros, zero_row_floats(geometry_), 0.0f);
    read_bias(panels_, geometry_.groups, operands.dtype, operands.bias, memory_.bias);
  }

  void run() {
    if (part_.by_image) return run_by_image();
    choice_.schedule == Schedule::kPrivate ? run_private() : run_shared();
    if (!log_.empty()) recompute_nonfinite(kernels_, part_, operands_, target_, log_);
  }

 private:
  void run_private() {
    const int64_t image_blocks = ceil_div(geometry_.images, choice_.images_per_block);
    const int strips = static_cast<int>(ceil_div(choice_.rows.tiles(), choice_.rows_per_block));
    // A worker keeps to one image where there are enough: its strips share rows of input.
    const bool whole = image_blocks * geometry_.groups >= 4 * operands_.threads;
    const int strips_per_job = whole ? strips : 1;
    const int64_t jobs_per_group = image_blocks * (strips / strips_per_job);
    run_jobs(jobs_per_group * geometry_.groups, operands_.threads, [&](int worker, int64_t job) {
      const int group = static_cast<int>(job / jobs_per_group);
      const int64_t first = job % jobs_per_group * strips_per_job;
      const Memory::Worker w = memory_.worker(worker);
      RowWindow window(source_, geometry_, w.window, choice_.kernels->points,
                       channel_blocks(geometry_) * kBlock);
      for (int64_t strip = first; strip < first + strips_per_job; ++strip) {
        run_block(group, private_block(strip / strips, static_cast<int>(strip % strips)), window, w,
                  {target_, log_});
      }
    });
  }

  // A worker makes all groups and strips of an image, then hands it on.
  void run_by_image() {
    const int strips = static_cast<int>(ceil_div(choice_.rows.tiles(), choice_.rows_per_block));
    run_jobs(geometry_.images, operands_.threads, [&](int worker, int64_t image) {
      const Memory::Worker w = memory_.worker(worker);
      const OutputTarget target = OutputTarget::image(kernels_, part_, w.image);
      NonfiniteLog log;
      const Sink sink{target, log};
      RowWindow window(source_, geometry_, w.window, choice_.kernels->points,
                       channel_blocks(geometry_) * kBlock);
      for (int group = 0; group < geometry_.groups; ++group) {
        for (int strip = 0; strip < strips; ++strip) {
          run_block(group, private_block(image, strip), window, w, sink);
        }
      }
      // The direct fallback is for whole outputs; a few tiles are made anew here.
      const bool lost = log.overflowed();
      if (!lost && !log.empty()) recompute_nonfinite(kernels_, part_, operands_, target, log);
      operands_.sink.image(operands_.sink.context, worker, image, lost ? nullptr : w.image);
    });
  }

  TileBlock private_block(int64_t image_block, int strip) const {
    TileBlock block;
    block.image_begin = image_block * choice_.images_per_block;
    block.images = std::min(choice_.images_per_block, geometry_.images - block.image_begin);
    block.row_begin = strip * choice_.rows_per_block;
    block.row_end = std::min(choice_.rows.tiles(), block.row_begin + choice_.rows_per_block);
    return block;
  }

  // Where results go, and where the tiles that met NaN are noted.
  struct Sink {
    const OutputTarget& target;
    NonfiniteLog& log;
  };

  void run_block(int group, const TileBlock& block, RowWindow& window, const Memory::Worker& w,
                 const Sink& sink) {
    const int channels = channel_blocks(geometry_);
    const PointLayout layout(choice_, block, int64_t{channels} * kBlock);
    for (int64_t image = 0; image < block.images; ++image) {
      for (int row = block.row_begin; row < block.row_end; ++row) {
        transform_.row(layout, block, image, group, row, 0, channels, window, w.v);
      }
    }
    const Span next = next_input(group, block);
    for (int panel = 0; panel < panels_.count(); ++panel) {
      multiply_and_write(group, panel, block, w.v, layout, 0, w, sink,
                         next.share(panel, panels_.count()));
    }
  }

  // The caller's rows that the next strip will read: memory to fetch while this one multiplies.
  Span next_input(int group, const TileBlock& block) const {
    if (block.images != 1) return {};
    const int big = choice_.kernels->big;
    const bool last = block.row_end == choice_.rows.tiles();
    if (last && block.image_begin + 1 >= geometry_.images) return {};
    const int64_t image = block.image_begin + (last ? 1 : 0);
    const int begin =
        last ? 0 : tile_position(choice_.rows, big, block.row_end) + geometry_.kernel_h - 1;
    const int end = begin + choice_.rows_per_block * big;
    return source_.memory_of_rows(image, group, begin - geometry_.offset_h,
                                  end - geometry_.offset_h);
  }

  void run_shared() {
    const int rows = choice_.rows.tiles();
    for (int64_t begin = 0; begin < geometry_.images; begin += choice_.images_per_block) {
      const TileBlock block{begin, std::min(choice_.images_per_block, geometry_.images - begin), 0,
                            rows};
      const PointLayout layout(choice_, block, int64_t{channel_blocks(geometry_)} * kBlock);
      transform_shared(block, layout);
      multiply_shared(block, layout);
    }
  }

  void transform_shared(const TileBlock& block, const PointLayout& layout) {
    const int rows = block.row_end, channels = channel_blocks(geometry_);
    const int64_t items = block.images * geometry_.groups * rows;
    // A few tile rows alone would leave workers idle: split their channels.
    const int splits =
        static_cast<int>(std::clamp<int64_t>(4 * operands_.threads / items, 1, channels));
    run_jobs(items * splits, operands_.threads, [&](int worker, int64_t job) {
      const int split = static_cast<int>(job % splits);
      const int64_t item = job / splits;
      const int row = static_cast<int>(item % rows);
      const int group = static_cast<int>(item / rows % geometry_.groups);
      RowWindow window(source_, geometry_, memory_.worker(worker).window, choice_.kernels->points,
                       channels * kBlock);
      transform_.row(layout, block, item / rows / geometry_.groups, group, row,
                     channels * split / splits, channels * (split + 1) / splits, window,
                     memory_.shared_v + group * memory_.group_floats);
    });
  }

  void multiply_shared(const TileBlock& block, const PointLayout& layout) {
    const int panels = geometry_.groups * panels_.count();
    const int64_t splits = image_splits(block.images, panels);
    const int64_t images = ceil_div(block.images, splits);
    run_jobs(panels * splits, operands_.threads, [&](int worker, int64_t job) {
      const int group = static_cast<int>(job / splits) / panels_.count();
      const int panel = static_cast<int>(job / splits) % panels_.count();
      const int64_t first = job % splits * images;
      TileBlock share = block;
      share.image_begin += first;
      share.images = std::min(images, block.images - first);
      if (share.images <= 0) return;
      multiply_and_write(group, panel, share, memory_.shared_v + group * memory_.group_floats,
                         layout, first, memory_.worker(worker), {target_, log_});
    });
  }

  // Enough items that the last ones even out, as long as there are images to split.
  int64_t image_splits(int64_t images, int panels) const {
    const int threads = operands_.threads;
    if (panels % threads == 0 || panels >= 4 * threads) return 1;
    return std::min<int64_t>(images, threads);
  }

  void multiply_and_write(int group, int panel, const TileBlock& block, const float* v,
                          const PointLayout& v_layout, int64_t first_image, const Memory::Worker& w,
                          const Sink& sink, const Span& prefetch = {}) {
    const int points = choice_.kernels->points;
    const int vectors = panels_.vectors(panel);
    const PointLayout m_layout(choice_, block, int64_t{vectors} * kernels_.lanes);
    const int64_t filters_before = int64_t{group} * panels_.padded() + panels_.first(panel);
    PointProduct product{};
    product.v = v;
    product.v_layout = &v_layout;
    product.first_image = first_image;
    product.block = &block;
    product.u = operands_.packed + filters_before * points * points * geometry_.channels;
    product.m = w.m;
    product.m_layout = &m_layout;
    product.vectors = vectors;
    product.prefetch = prefetch;
    multiply_points(kernels_, part_, product);
    for (int64_t image = 0; image < block.images; ++image) {
      for (int row = block.row_begin; row < block.row_end; ++row) {
        write_row(group, panel, block, image, row, m_layout, w, sink);
      }
    }
  }

  void write_row(int group, int panel, const TileBlock& block, int64_t image, int row,
                 const PointLayout& layout, const Memory::Worker& w, const Sink& sink) {
    const int points = choice_.kernels->points, big = choice_.kernels->big;
    const int width = panels_.vectors(panel) * kernels_.lanes;
    std::array<const float*, kMaxPoints * kMaxPoints> streams;
    for (int p = 0; p < points * points; ++p) {
      streams[p] = w.m + layout.base(p) + layout.row_tile(p, image, row) * width;
    }
    const int y = tile_position(choice_.rows, big, row);
    const int64_t target_image = block.image_begin + image;
    const int filter = panels_.first(panel), filters = panels_.valid(panel);
    TileFlags nonfinite(choice_.columns.tiles());
    OutputRowCall call{};
    call.points = streams.data();
    call.vectors = panels_.vectors(panel);
    call.channels = filters;
    call.bias = memory_.bias + int64_t{group} * panels_.padded() + filter;
    call.relu = operands_.relu_in_kernel();
    call.columns = choice_.columns;
    call.big_row = row < choice_.rows.big;
    call.nonfinite = nonfinite.data();
    const int tile_rows = call.big_row ? big : big - 1;
    const auto add_residual = [&] {
      for (int i = 0; i < tile_rows; ++i) {
        sink.target.add_residual(target_image, group, filter, filters, y + i, 0,
                                 geometry_.out_width, call.output + i * call.row_stride,
                                 call.pixel_stride);
      }
    };
    if (sink.target.in_place()) {
      call.output = static_cast<float*>(sink.target.pixel(target_image, group, filter, y, 0));
      call.pixel_stride = sink.target.pixel_stride();
      call.row_stride = sink.target.row_stride();
      choice_.kernels->output_row(call);
      add_residual();
    } else {
      call.output = w.staging;
      call.pixel_stride = panels_.width();
      call.row_stride = int64_t{geometry_.out_width} * panels_.width();
      choice_.kernels->output_row(call);
      add_residual();
      for (int i = 0; i < tile_rows; ++i) {
        sink.target.write_row(target_image, group, filter, filters, y + i, 0, geometry_.out_width,
                              w.staging + i * call.row_stride, call.pixel_stride);
      }
    }
    if (!nonfinite.any()) return;
    for (int t = 0; t < choice_.columns.tiles(); ++t) {
      if (!nonfinite.data()[t]) continue;
      sink.log.add({target_image, group, filter, filters, y, tile_rows,
                    tile_position(choice_.columns, big, t),
                    t < choice_.columns.big ? big : big - 1});
    }
  }

  const ConvKernels& kernels_;
  const Part& part_;
  const Operands& operands_;
  const Geometry& geometry_;
  const WinogradChoice& choice_;
  const Panels panels_;
  const InputSource source_;
  const OutputTarget target_;
  const Memory memory_;
  const InputTransform transform_;
  NonfiniteLog log_;
};

}  // namespace

size_t winograd_scratch_bytes(const ConvKernels& kernels, const Part& part, int threads) {
  return Memory(part, {part.geometry.filters, kernels.lanes}, nullptr, threads).total_bytes;
}

void run_winograd(const ConvKernels& kernels, const Part& part, const Operands& operands) {
  WinogradRun(kernels, part, operands).run();
}

}  // namespace fastalex::cpu::conv

// The direct engine: any convolution as matrix products over the taps, read in place or from a
// zero-padded band of rows; no im2col buffer.
#include <vector>

#include "arena.h"
#include "bands.h"
#include "panels.h"
#include "target.h"
#include "workers.h"

namespace fastalex::cpu::conv {
namespace {

bool pointwise(const Geometry& g) {
  return g.kernel_h == 1 && g.kernel_w == 1 && g.stride_h == 1 && g.stride_w == 1 &&
         g.offset_h == 0 && g.offset_w == 0 && g.height == g.out_height && g.width == g.out_width;
}

// All pixels of all images lie at one distance, as those of a dense channels-last tensor do.
bool one_row(const Strides& s, const Geometry& g) {
  return s.h == s.w * g.width && (g.images <= 1 || s.n == s.h * g.height);
}

int64_t band_pixels(const Geometry& g, int rows) {
  return int64_t{band_height(g, rows)} * band_width(g);
}

int64_t staged_pixels(const Part& part) {
  const Geometry& g = part.geometry;
  const int64_t band = int64_t{part.direct.rows_per_band} * g.out_width;
  return pointwise(g) ? std::max(band, part.direct.pixels_per_band) : band;
}

struct Memory {
  struct Worker {
    float* band;
    float* staging;
    float* image;
  };
  float* bias;
  char* workers;
  size_t worker_bytes, total_bytes;

  Memory(const Part& part, const Panels& panels, char* base, int threads)
      : band_floats_(band_pixels(part.geometry, part.direct.rows_per_band) *
                     part.geometry.channels),
        staging_floats_(staged_pixels(part) * panels.width()),
        image_floats_(part.by_image ? image_floats(part.geometry) : 0) {
    Arena arena(base);
    bias = arena.take(int64_t{part.geometry.groups} * panels.padded());
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
    w.band = arena.take(band_floats_);
    w.staging = arena.take(staging_floats_);
    w.image = arena.take(image_floats_);
    return w;
  }
  int64_t band_floats_, staging_floats_, image_floats_;
};

// Inner-product terms of one pass: those whose weights stay in L1 together.
struct TermPass {
  std::vector<Segment> segments;
  int64_t first_term = 0;
};

std::vector<TermPass> term_passes(const Geometry& g, int limit, ptrdiff_t row_stride,
                                  ptrdiff_t pixel_stride) {
  std::vector<TermPass> passes(1);
  int room = limit;
  int64_t term = 0;
  const bool merged = g.dilation_w == 1 && pixel_stride == g.channels;
  const int runs = merged ? 1 : g.kernel_w;
  const int length = merged ? g.kernel_w * g.channels : g.channels;
  for (int ky = 0; ky < g.kernel_h; ++ky) {
    for (int run = 0; run < runs; ++run) {
      const ptrdiff_t base = ky * g.dilation_h * row_stride + run * g.dilation_w * pixel_stride;
      for (int done = 0; done < length;) {
        if (room == 0) {
          passes.emplace_back().first_term = term;
          room = limit;
        }
        const int part = std::min(room, length - done);
        passes.back().segments.push_back({base + done, part});
        done += part;
        room -= part;
        term += part;
      }
    }
  }
  return passes;
}

// The input as the part's geometry counts it: a pair of bfloat16 passes for a float, since nothing
// but the products looks into it.
DType element_type(const Part& part, DType dtype) { return part.pairs ? DType::kFloat32 : dtype; }

ConstTensor elements(const Part& part, const ConstTensor& input) {
  const Strides& s = input.strides;
  return part.pairs ? ConstTensor{input.data, {s.n / 2, s.c, s.h / 2, s.w / 2}} : input;
}

class DirectRun {
 public:
  DirectRun(const ConvKernels& kernels, const Part& part, const Operands& operands)
      : kernels_(kernels),
        part_(part),
        operands_(operands),
        geometry_(part.geometry),
        panels_{part.geometry.filters, kernels.lanes},
        source_(kernels, part.geometry, part.fold, element_type(part, operands.dtype),
                elements(part, operands.input), operands.mask, operands.prologue),
        target_(kernels, part, operands),
        memory_(part, panels_, operands.scratch, operands.threads) {
    read_bias(panels_, geometry_.groups, operands.dtype, operands.bias, memory_.bias);
    in_place_ = source_.in_place() && covered(geometry_);
    flat_ = !part.by_image && in_place_ && pointwise(geometry_) && target_.in_place() &&
            one_row(operands.input.strides, geometry_) &&
            one_row({operands.output.strides.n, 1, target_.row_stride(), target_.pixel_stride()},
                    geometry_) &&
            (!operands.residual.data || one_row(operands.residual.strides, geometry_));
    flat_pixels_ = part.direct.pixels_per_band;
    if (operands.residual.data) {  // the band's results stay in L2 until the residual is added
      constexpr int64_t kResultBytes = 256 << 10, kMinPixels = 64;
      flat_pixels_ =
          std::min(flat_pixels_, std::max(kMinPixels, kResultBytes / (4 * geometry_.filters)));
    }
    const ptrdiff_t band_pixel = geometry_.channels;
    pixel_stride_ = in_place_ ? source_.pixel_stride() : band_pixel;
    row_stride_ = in_place_ ? source_.row_stride() : band_pixel * band_width(geometry_);
    passes_ = term_passes(geometry_, part.direct.terms_per_pass, row_stride_, pixel_stride_);
  }

  void run() { part_.by_image ? run_by_image() : run_bands(); }

 private:
  // A worker makes all groups and bands of an image, then hands it on.
  void run_by_image() const {
    const int bands = static_cast<int>(ceil_div(geometry_.out_height, part_.direct.rows_per_band));
    run_jobs(geometry_.images, operands_.threads, [&](int worker, int64_t image) {
      const Memory::Worker w = memory_.worker(worker);
      const OutputTarget target = OutputTarget::image(kernels_, part_, w.image);
      for (int group = 0; group < geometry_.groups; ++group) {
        for (int band = 0; band < bands; ++band) {
          run_band(group, image, band, 0, panels_.count(), w, target);
        }
      }
      operands_.sink.image(operands_.sink.context, worker, image, w.image);
    });
  }

  void run_bands() const {
    const int splits = part_.direct.filter_splits;
    const int64_t bands = flat_ ? ceil_div(pixels(), flat_pixels_)
                                : ceil_div(geometry_.out_height, part_.direct.rows_per_band);
    const int64_t images = flat_ ? 1 : geometry_.images;
    run_jobs(geometry_.groups * images * bands * splits, operands_.threads,
             [&](int worker, int64_t job) {
               const int split = static_cast<int>(job % splits);
               job /= splits;
               const int64_t band = job % bands;
               const int64_t image = job / bands % images;
               const int group = static_cast<int>(job / bands / images);
               const int first = panels_.count() * split / splits;
               const int last = panels_.count() * (split + 1) / splits;
               if (flat_) {
                 run_flat_band(group, band, first, last, memory_.worker(worker));
               } else {
                 run_band(group, image, static_cast<int>(band), first, last, memory_.worker(worker),
                          target_);
               }
             });
  }

  int64_t pixels() const { return geometry_.images * geometry_.height * geometry_.width; }
  void run_band(int group, int64_t image, int band, int first_panel, int last_panel,
                const Memory::Worker& w, const OutputTarget& target) const {
    const Geometry& g = geometry_;
    const int y = band * part_.direct.rows_per_band;
    const int rows = std::min(part_.direct.rows_per_band, g.out_height - y);
    const int first_y = y * g.stride_h - g.offset_h;
    const float* a;
    if (in_place_) {
      a = source_.pixel(image, group, first_y) - g.offset_w * pixel_stride_;
    } else {
      fill_band(source_, g, image, group, first_y, band_height(g, rows), w.band);
      a = w.band;
    }
    for (int panel = first_panel; panel < last_panel; ++panel) {
      const Destination out =
          destination(target, image, group, panel, y, 0, w.staging, g.out_width);
      // Rows of pixels at one distance from the last of one to the first of the next are one row.
      const bool merged = pointwise(g) && row_stride_ == g.width * pixel_stride_ &&
                          out.row_stride == g.width * out.pixel_stride;
      for (size_t pass = 0; pass < passes_.size(); ++pass) {
        for (int row = 0; row < (merged ? 1 : rows); ++row) {
          multiply(group, panel, pass, a + row * g.stride_h * row_stride_,
                   merged ? int64_t{rows} * g.width : g.out_width, out.data + row * out.row_stride,
                   out.pixel_stride);
        }
      }
      for (int row = 0; row < rows; ++row) {
        target.add_residual(image, group, panels_.first(panel), panels_.valid(panel), y + row, 0,
                            g.out_width, out.data + row * out.row_stride, out.pixel_stride);
      }
      if (out.staged) {
        for (int row = 0; row < rows; ++row) {
          target.write_row(image, group, panels_.first(panel), panels_.valid(panel), y + row, 0,
                           g.out_width, out.data + row * out.row_stride, out.pixel_stride);
        }
      }
    }
  }

  void run_flat_band(int group, int64_t band, int first_panel, int last_panel,
                     const Memory::Worker& w) const {
    const int64_t first = band * flat_pixels_;
    const int64_t count = std::min(flat_pixels_, pixels() - first);
    const float* a = source_.pixel(0, group, 0) + first * pixel_stride_;
    for (int panel = first_panel; panel < last_panel; ++panel) {
      const Destination out = destination(target_, 0, group, panel, 0, first, w.staging, 0);
      for (size_t pass = 0; pass < passes_.size(); ++pass) {
        multiply(group, panel, pass, a, count, out.data, out.pixel_stride);
      }
      if (out.staged) {
        target_.add_residual(0, group, panels_.first(panel), panels_.valid(panel), 0, first, count,
                             out.data, out.pixel_stride);
        target_.write_row(0, group, panels_.first(panel), panels_.valid(panel), 0, first, count,
                          out.data, out.pixel_stride);
      }
    }
    // Whole pixels at a time: a panel's share of a residual would be pieces far apart in memory.
    const int filter = panels_.first(first_panel);
    const int last = panels_.valid(last_panel - 1);
    const bool staged = last % kernels_.lanes != 0;
    const int filters = panels_.first(last_panel - 1) + (staged ? 0 : last) - filter;
    target_.add_residual(0, group, filter, filters, 0, first, count,
                         static_cast<float*>(target_.pixel(0, group, filter, 0, first)),
                         target_.pixel_stride());
  }

  struct Destination {
    float* data;
    ptrdiff_t pixel_stride, row_stride;
    bool staged;
  };
  Destination destination(const OutputTarget& target, int64_t image, int group, int panel, int y,
                          int64_t x, float* staging, int64_t staged_width) const {
    const ptrdiff_t width = int64_t{panels_.vectors(panel)} * kernels_.lanes;
    if (target.in_place() && panels_.valid(panel) == width) {
      void* pixel = target.pixel(image, group, panels_.first(panel), y, x);
      return {static_cast<float*>(pixel), target.pixel_stride(), target.row_stride(), false};
    }
    return {staging, width, width * staged_width, true};
  }

  void multiply(int group, int panel, size_t pass, const float* a, int64_t rows, float* c,
                ptrdiff_t c_stride) const {
    const int64_t padded_before = int64_t{group} * panels_.padded() + panels_.first(panel);
    const int width = panels_.vectors(panel) * kernels_.lanes;
    const bool last = pass + 1 == passes_.size();
    GemmCall call{};
    call.a = a;
    call.row_stride = geometry_.stride_w * pixel_stride_;
    call.rows = rows;
    call.segments = passes_[pass].segments.data();
    call.segment_count = static_cast<int>(passes_[pass].segments.size());
    call.b =
        operands_.packed + padded_before * geometry_.terms() + passes_[pass].first_term * width;
    call.vectors = panels_.vectors(panel);
    call.c = c;
    call.c_stride = c_stride;
    call.accumulate = pass > 0;
    call.bias = last ? memory_.bias + padded_before : nullptr;
    call.relu = last && operands_.relu_in_kernel();
    call.pairs = part_.pairs;
    kernels_.gemm(call);
  }

  const ConvKernels& kernels_;
  const Part& part_;
  const Operands& operands_;
  const Geometry& geometry_;
  const Panels panels_;
  const InputSource source_;
  const OutputTarget target_;
  const Memory memory_;
  bool in_place_ = false, flat_ = false;
  int64_t flat_pixels_ = 0;  // of a flat band
  ptrdiff_t pixel_stride_ = 0, row_stride_ = 0;
  std::vector<TermPass> passes_;
};

}  // namespace

void block_direct(const ConvKernels& kernels, Part& part, int threads) {
  constexpr int64_t kBandBytes = 256 << 10, kWeightBytes = 32 << 10;
  constexpr int64_t kMinBandPixels = 64;
  const Geometry& g = part.geometry;
  const Panels panels{g.filters, kernels.lanes};
  DirectChoice& choice = part.direct;
  choice.terms_per_pass = static_cast<int>(kWeightBytes / (panels.width() * sizeof(float)));
  const int64_t jobs_wanted = 4 * threads;
  // Rows: as many as keep the band in L2, but no more than leave every worker some.
  const int64_t bands_wanted =
      std::clamp<int64_t>(ceil_div(jobs_wanted, std::max<int64_t>(1, g.images * g.groups)), 1,
                          std::max(1, g.out_height));
  const int64_t row_limit = std::max<int64_t>(1, g.out_height / bands_wanted);
  int64_t rows = 1;
  while (rows < row_limit &&
         band_pixels(g, static_cast<int>(rows + 1)) * g.channels * 4 <= kBandBytes) {
    ++rows;
  }
  rows = std::max(rows,
                  std::min<int64_t>(row_limit, ceil_div(kMinBandPixels, std::max(1, g.out_width))));
  choice.rows_per_band = static_cast<int>(rows);
  const int64_t pixels = g.images * g.out_height * g.out_width;
  choice.pixels_per_band = std::clamp<int64_t>(
      std::min(kBandBytes / (4 * std::max(1, g.channels)), ceil_div(pixels, jobs_wanted)),
      std::min<int64_t>(kMinBandPixels, std::max<int64_t>(1, pixels)), 4096);
  const int64_t bands = g.groups * (pointwise(g) ? ceil_div(pixels, choice.pixels_per_band)
                                                 : g.images * ceil_div(g.out_height, rows));
  choice.filter_splits = static_cast<int>(
      std::clamp<int64_t>(2 * threads / std::max<int64_t>(1, bands), 1, panels.count()));
  part.packed_bytes = align_up(sizeof(float) * g.groups * panels.padded() * g.terms());
  part.scratch_bytes = Memory(part, panels, nullptr, threads).total_bytes;
}

void run_direct(const ConvKernels& kernels, const Part& part, const Operands& operands) {
  DirectRun(kernels, part, operands).run();
}

}  // namespace fastalex::cpu::conv

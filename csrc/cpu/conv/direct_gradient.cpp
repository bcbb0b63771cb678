// Weight and bias gradients directly: one A^T B product per run of taps, over the pixels of all
// rows.
#include <array>
#include <vector>

#include "arena.h"
#include "bands.h"
#include "gradient.h"
#include "workers.h"

namespace fastalex::cpu::conv {
namespace {

// Pixels whose gradients of one panel stay in L1; sums are rounded into memory once per run.
constexpr int64_t kPixelsPerRun = 160;
constexpr int kColumnsPerJob = 64;

struct Memory {
  float* x;   // [group][image][band height][band width][channels], where x cannot be read in place
  float* d;   // [group][panel][image][pixel][panel width]
  float* dw;  // [group][panel][term][panel width]
  float* db;  // [group][padded filters]
  size_t total_bytes;
  int64_t image_floats, pixels;

  Memory(const Part& part, const Panels& panels, char* base) {
    const Geometry& g = part.geometry;
    const int64_t images = part.direct.images_per_block;
    image_floats = int64_t{band_height(g, g.out_height)} * band_width(g) * g.channels;
    pixels = int64_t{g.out_height} * g.out_width;
    Arena arena(base);
    x = arena.take(g.groups * images * image_floats);
    d = arena.take(g.groups * images * pixels * panels.padded());
    dw = arena.take(int64_t{g.groups} * panels.padded() * g.terms());
    db = arena.take(int64_t{g.groups} * panels.padded());
    total_bytes = arena.bytes();
  }
};

// Adjacent inner-product terms: `columns` of them, the first at `offset` floats into the input.
struct TermRun {
  ptrdiff_t offset;
  int term, columns;
};

class GradientRun {
 public:
  GradientRun(const ConvKernels& kernels, const Part& part, const GradientOperands& operands)
      : kernels_(kernels),
        part_(part),
        operands_(operands),
        geometry_(part.geometry),
        panels_{part.geometry.filters, kernels.lanes},
        gradient_geometry_(gradient_geometry(part.geometry)),
        source_(kernels, part.geometry, part.fold, operands.dtype, operands.input, {}),
        gradient_(kernels, gradient_geometry_, part.fold, operands.dtype, operands.gradient,
                  operands.mask),
        memory_(part, panels_, operands.scratch),
        in_place_(source_.in_place() && covered(geometry_)) {
    pixel_stride_ = in_place_ ? source_.pixel_stride() : geometry_.channels;
    row_stride_ =
        in_place_ ? source_.row_stride() : ptrdiff_t{geometry_.channels} * band_width(geometry_);
    list_runs();
  }

  void run() {
    if (geometry_.images == 0) clear();
    const int64_t block = part_.direct.images_per_block;
    for (int64_t first = 0; first < geometry_.images; first += block) {
      const int64_t images = std::min(block, geometry_.images - first);
      prepare(first, images);
      multiply(first, images);
    }
    write();
  }

 private:
  void clear() {
    std::fill_n(memory_.dw, int64_t{geometry_.groups} * panels_.padded() * geometry_.terms(), 0.0f);
    std::fill_n(memory_.db, int64_t{geometry_.groups} * panels_.padded(), 0.0f);
  }

  void list_runs() {
    const Geometry& g = geometry_;
    const bool merged = g.dilation_w == 1 && pixel_stride_ == g.channels;
    const int length = merged ? g.kernel_w * g.channels : g.channels;
    int term = 0;
    for (int ky = 0; ky < g.kernel_h; ++ky) {
      for (int kx = 0; kx < (merged ? 1 : g.kernel_w); ++kx) {
        const ptrdiff_t base = ky * g.dilation_h * row_stride_ + kx * g.dilation_w * pixel_stride_;
        for (int done = 0; done < length; done += kColumnsPerJob) {
          const int columns = std::min(kColumnsPerJob, length - done);
          runs_.push_back({base + done, term, columns});
          term += columns;
        }
      }
    }
  }

  // Padded input and panels of output gradients of the block's images.
  void prepare(int64_t first, int64_t images) {
    const Geometry& g = geometry_;
    run_jobs(images * g.groups, operands_.threads, [&](int, int64_t job) {
      const int group = static_cast<int>(job / images);
      const int64_t image = job % images;
      if (!in_place_) {
        fill_band(source_, g, first + image, group, -g.offset_h, band_height(g, g.out_height),
                  memory_.x + job * memory_.image_floats);
      }
      for (int panel = 0; panel < panels_.count(); ++panel) {
        fill_panel(first, images, image, group, panel);
      }
    });
  }

  float* panel_gradient(int64_t images, int group, int panel) const {
    return memory_.d +
           images * memory_.pixels * (int64_t{group} * panels_.padded() + panels_.first(panel));
  }

  void fill_panel(int64_t first, int64_t images, int64_t image, int group, int panel) const {
    const int64_t width = int64_t{panels_.vectors(panel)} * kernels_.lanes;
    float* out = panel_gradient(images, group, panel) + image * memory_.pixels * width;
    for (int y = 0; y < geometry_.out_height; ++y, out += geometry_.out_width * width) {
      gradient_.read_channels(first + image, group, panels_.first(panel), panels_.valid(panel), y,
                              out, width);
    }
  }

  void multiply(int64_t first, int64_t images) {
    const int64_t runs = static_cast<int64_t>(runs_.size()) + 1;  // the last is the bias
    const int panels = panels_.count();
    run_jobs(runs * panels * geometry_.groups, operands_.threads, [&](int, int64_t job) {
      const int64_t run = job % runs;
      const int panel = static_cast<int>(job / runs % panels);
      const int group = static_cast<int>(job / runs / panels);
      if (run + 1 < runs) {
        multiply_run(first, images, group, panel, runs_[run]);
      } else {
        sum_bias(first, images, group, panel);
      }
    });
  }

  void multiply_run(int64_t first, int64_t images, int group, int panel, const TermRun& run) {
    const Geometry& g = geometry_;
    const int64_t width = int64_t{panels_.vectors(panel)} * kernels_.lanes;
    const int rows_per_run =
        static_cast<int>(std::clamp<int64_t>(kPixelsPerRun / g.out_width, 1, kMaxRows));
    std::array<Segment, kMaxRows> rows;
    OuterCall call{};
    call.step = g.stride_w * pixel_stride_;
    call.columns = run.columns;
    call.segments = rows.data();
    call.vectors = panels_.vectors(panel);
    call.c_stride = width;
    call.c = memory_.dw + (int64_t{group} * panels_.padded() + panels_.first(panel)) * g.terms() +
             run.term * width;
    for (int64_t image = 0; image < images; ++image) {
      const float* x = image_input(first + image, images, group, image) + run.offset;
      const float* d = panel_gradient(images, group, panel) + image * memory_.pixels * width;
      for (int y = 0; y < g.out_height; y += rows_per_run) {
        call.segment_count = std::min(rows_per_run, g.out_height - y);
        for (int i = 0; i < call.segment_count; ++i) {
          rows[i] = {i * g.stride_h * row_stride_, g.out_width};
        }
        call.a = x + y * g.stride_h * row_stride_;
        call.b = d + int64_t{y} * g.out_width * width;
        call.accumulate = first + image > 0 || y > 0;
        kernels_.outer(call);
      }
    }
  }

  const float* image_input(int64_t source_image, int64_t images, int group, int64_t image) const {
    if (!in_place_) return memory_.x + (group * images + image) * memory_.image_floats;
    return source_.pixel(source_image, group, -geometry_.offset_h) -
           geometry_.offset_w * pixel_stride_;
  }

  void sum_bias(int64_t first, int64_t images, int group, int panel) {
    const int width = panels_.vectors(panel) * kernels_.lanes;
    float* sums = memory_.db + int64_t{group} * panels_.padded() + panels_.first(panel);
    add_rows(panel_gradient(images, group, panel), images * memory_.pixels, width, first > 0, sums);
  }

  void write() {
    const Geometry& g = geometry_;
    const int panels = panels_.count();
    run_jobs(int64_t{g.groups} * panels * g.channels, operands_.threads, [&](int, int64_t job) {
      const int channel = static_cast<int>(job % g.channels);
      const int panel = static_cast<int>(job / g.channels % panels);
      const int group = static_cast<int>(job / g.channels / panels);
      const int64_t width = int64_t{panels_.vectors(panel)} * kernels_.lanes;
      const float* sums =
          memory_.dw + (int64_t{group} * panels_.padded() + panels_.first(panel)) * g.terms();
      std::vector<float> taps(static_cast<size_t>(g.kernel_h * g.kernel_w * width));
      for (int t = 0; t < g.kernel_h * g.kernel_w; ++t) {
        std::copy_n(sums + (int64_t{t} * g.channels + channel) * width, width,
                    taps.data() + t * width);
      }
      write_weight_gradient(part_, operands_, group, panels_.first(panel), panels_.valid(panel),
                            channel, static_cast<int>(width), taps.data());
    });
    if (!operands_.bias_gradient) return;
    for (int group = 0; group < g.groups; ++group) {
      write_bias_gradient(operands_, panels_, group,
                          memory_.db + int64_t{group} * panels_.padded());
    }
  }

  static constexpr int64_t kMaxRows = 64;

  const ConvKernels& kernels_;
  const Part& part_;
  const GradientOperands& operands_;
  const Geometry& geometry_;
  const Panels panels_;
  const Geometry gradient_geometry_;
  const InputSource source_;
  const InputSource gradient_;
  const Memory memory_;
  const bool in_place_;
  ptrdiff_t pixel_stride_ = 0, row_stride_ = 0;
  std::vector<TermRun> runs_;
};

}  // namespace

void block_direct_gradient(const ConvKernels& kernels, Part& part, int) {
  constexpr int64_t kBlockBytes = 8 << 20;
  const Geometry& g = part.geometry;
  const Panels panels{g.filters, kernels.lanes};
  part.direct.images_per_block = 1;
  const Memory image(part, panels, nullptr);
  const int64_t bytes =
      4 * g.groups * (image.image_floats + image.pixels * int64_t{panels.padded()});
  part.direct.images_per_block = std::clamp<int64_t>(kBlockBytes / std::max<int64_t>(1, bytes), 1,
                                                     std::max<int64_t>(1, g.images));
  part.packed_bytes = 0;
  part.scratch_bytes = Memory(part, panels, nullptr).total_bytes;
}

void run_direct_weight_gradient(const ConvKernels& kernels, const Part& part,
                                const GradientOperands& operands) {
  GradientRun(kernels, part, operands).run();
}

}  // namespace fastalex::cpu::conv

// Linear + bias + ReLU and its gradients on the convolution's micro-kernel.
#include "linear.h"

#include <array>

#include "conv/arena.h"
#include "conv/gradient.h"
#include "conv/panels.h"
#include "conv/workers.h"

namespace fastalex::cpu::linear {
namespace {

using conv::align_up;
using conv::Arena;
using conv::ceil_div;
using conv::ConvKernels;
using conv::element_at;
using conv::GatherCall;
using conv::GemmCall;
using conv::kBlock;
using conv::OuterCall;
using conv::Panels;
using conv::run_jobs;
using conv::ScatterCall;
using conv::Segment;

constexpr int kBlocksPerPass = 16;  // 256 inputs x 32 outputs of weights stay in L1

// Rows of a matrix as float: out[row * out_stride + column].
void read_rows(const ConvKernels& kernels, DType dtype, const void* data, const void* mask,
               int64_t stride, int64_t first, int64_t rows, int columns, int padded, float* out,
               ptrdiff_t out_stride) {
  GatherCall call{};
  call.data = element_at(data, dtype, first);
  call.dtype = dtype;
  call.pixel_stride = stride;
  call.channel_stride = 1;
  if (mask) {
    call.mask = element_at(mask, dtype, first);
    call.mask_pixel_stride = stride;
    call.mask_channel_stride = 1;
  }
  call.pixels = rows;
  call.channels = columns;
  call.padded_channels = padded;
  call.out = out;
  call.out_stride = out_stride;
  kernels.gather(call);
}

void write_rows(const ConvKernels& kernels, DType dtype, const float* data, ptrdiff_t data_stride,
                int64_t rows, int columns, void* out, int64_t first, int64_t stride,
                int64_t column_stride) {
  ScatterCall call{};
  call.data = data;
  call.data_stride = data_stride;
  call.pixels = rows;
  call.channels = columns;
  call.out = element_at(out, dtype, first);
  call.dtype = dtype;
  call.pixel_stride = stride;
  call.channel_stride = column_stride;
  kernels.scatter(call);
}

// The forward pass: one job per panel of outputs, which streams that panel's weights once.
class Forward {
 public:
  Forward(const ConvKernels& kernels, const Problem& problem, int threads, char* scratch)
      : kernels_(kernels),
        problem_(problem),
        threads_(threads),
        panels_{problem.outputs, kernels.lanes},
        blocks_(static_cast<int>(ceil_div(problem.inputs, kBlock))) {
    Arena arena(scratch);
    bias_ = arena.take(panels_.padded());
    x_ = arena.take(int64_t{blocks_} * kBlock * problem.rows);
    staging_ = arena.take(threads * staging_floats());
    bytes_ = arena.bytes();
  }

  size_t bytes() const { return bytes_; }

  void run(const ForwardCall& call) const {
    conv::read_bias(panels_, 1, problem_.dtype, call.bias, bias_);
    // [block of inputs][row][kBlock]: rows at a distance the kernel knows, whatever the batch.
    parallel_for(blocks_, 64, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int valid = std::min<int64_t>(kBlock, problem_.inputs - block * kBlock);
        read_rows(kernels_, problem_.dtype, call.input, nullptr, problem_.inputs, block * kBlock,
                  problem_.rows, valid, kBlock, x_ + block * problem_.rows * kBlock, kBlock);
      }
    });
    run_jobs(panels_.count(), threads_, [&](int worker, int64_t panel) {
      run_panel(call, static_cast<int>(panel), staging_ + worker * staging_floats());
    });
  }

 private:
  int64_t staging_floats() const { return problem_.rows * panels_.width(); }

  void run_panel(const ForwardCall& call, int panel, float* staging) const {
    const int width = panels_.vectors(panel) * kernels_.lanes;
    const float* weights =
        static_cast<const float*>(call.packed) + int64_t{panels_.first(panel)} * problem_.inputs;
    std::array<Segment, kBlocksPerPass> segments;
    GemmCall gemm{};
    gemm.row_stride = kBlock;
    gemm.rows = problem_.rows;
    gemm.segments = segments.data();
    gemm.vectors = panels_.vectors(panel);
    gemm.c = staging;
    gemm.c_stride = width;
    for (int first = 0; first < blocks_; first += kBlocksPerPass) {
      gemm.segment_count = std::min(kBlocksPerPass, blocks_ - first);
      for (int s = 0; s < gemm.segment_count; ++s) {
        segments[s] = {s * problem_.rows * kBlock,
                       std::min(kBlock, problem_.inputs - (first + s) * kBlock)};
      }
      const bool last = first + kBlocksPerPass >= blocks_;
      gemm.a = x_ + first * problem_.rows * kBlock;
      gemm.b = weights + int64_t{first} * kBlock * width;
      gemm.accumulate = first > 0;
      gemm.bias = last ? bias_ + panels_.first(panel) : nullptr;
      gemm.relu = last && problem_.relu;
      kernels_.gemm(gemm);
    }
    write_rows(kernels_, problem_.dtype, staging, width, problem_.rows, panels_.valid(panel),
               call.output, panels_.first(panel), problem_.outputs, 1);
  }

  const ConvKernels& kernels_;
  const Problem& problem_;
  const int threads_;
  const Panels panels_;
  const int blocks_;
  float *bias_, *x_, *staging_;
  size_t bytes_;
};

// Both gradients. Rows of the batch are taken in panels too: they are the columns of dx^T = W^T
// dz^T.
class Backward {
 public:
  Backward(const ConvKernels& kernels, const Problem& problem, int threads, char* scratch)
      : kernels_(kernels),
        problem_(problem),
        threads_(threads),
        outputs_{problem.outputs, kernels.lanes},
        rows_{static_cast<int>(problem.rows), kernels.lanes},
        inputs_{problem.inputs, kernels.lanes} {
    Arena arena(scratch);
    dz_ = arena.take(problem.rows * outputs_.padded());
    dz_transposed_ = arena.take(int64_t{rows_.padded()} * outputs_.padded());
    db_ = arena.take(outputs_.padded());
    workers_ = scratch ? scratch + arena.bytes() : nullptr;
    Arena measure;
    worker(measure);
    worker_bytes_ = measure.bytes();
    bytes_ = arena.bytes() + threads * worker_bytes_;
  }

  size_t bytes() const { return bytes_; }

  void run(const BackwardCall& call) const {
    prepare(call);
    if (call.input_gradient) {
      run_jobs(ceil_div(problem_.inputs, kInputsPerJob), threads_, [&](int index, int64_t job) {
        Arena arena(workers_ + index * worker_bytes_);
        input_gradient(call, static_cast<int>(job) * kInputsPerJob, worker(arena));
      });
    }
    if (call.weight_gradient) {
      run_jobs(inputs_.count(), threads_, [&](int index, int64_t job) {
        Arena arena(workers_ + index * worker_bytes_);
        weight_gradient(call, static_cast<int>(job), worker(arena));
      });
    }
    if (call.bias_gradient) {
      conv::GradientOperands operands{};
      operands.dtype = problem_.dtype;
      operands.bias_gradient = call.bias_gradient;
      conv::write_bias_gradient(operands, outputs_, 0, db_);
    }
  }

 private:
  static constexpr int kInputsPerJob = 256;
  static constexpr int kOutputsPerPass = 256;

  struct Worker {
    float* sums;   // dx^T of one job, or dw of one pass
    float* panel;  // x of one panel of inputs
  };
  Worker worker(Arena& arena) const {
    Worker w;
    w.sums = arena.take(std::max<int64_t>(int64_t{kInputsPerJob} * rows_.padded(),
                                          int64_t{kOutputsPerPass} * inputs_.width()));
    w.panel = arena.take(problem_.rows * inputs_.width());
    return w;
  }

  // dz as it is and transposed by panels of rows, and its column sums.
  void prepare(const BackwardCall& call) const {
    const int padded = outputs_.padded();
    run_jobs(outputs_.count(), threads_, [&](int, int64_t job) {
      const int panel = static_cast<int>(job), first = outputs_.first(panel);
      const int width = outputs_.vectors(panel) * kernels_.lanes;
      read_rows(kernels_, problem_.dtype, call.gradient, call.output, problem_.outputs, first,
                problem_.rows, outputs_.valid(panel), width, dz_ + first, padded);
      for (int i = 0; i < width; ++i) db_[first + i] = 0.0f;
      for (int64_t row = 0; row < problem_.rows; ++row) {
        for (int i = 0; i < width; ++i) db_[first + i] += dz_[row * padded + first + i];
      }
      for (int rows = 0; rows < rows_.count(); ++rows) {
        const int columns = rows_.vectors(rows) * kernels_.lanes;
        float* out =
            dz_transposed_ + int64_t{rows_.first(rows)} * padded + int64_t{first} * columns;
        for (int i = 0; i < width; ++i, out += columns) {
          for (int r = 0; r < columns; ++r) {
            const int64_t row = rows_.first(rows) + r;
            out[r] = row < problem_.rows ? dz_[row * padded + first + i] : 0.0f;
          }
        }
      }
    });
  }

  // dx^T[input][row] = sum over outputs of W[input][output] dz^T[output][row], a panel of W at a
  // time.
  void input_gradient(const BackwardCall& call, int first, const Worker& w) const {
    const int count = std::min(kInputsPerJob, problem_.inputs - first);
    const float* packed = static_cast<const float*>(call.packed);
    for (int panel = 0; panel < outputs_.count(); ++panel) {
      const int width = outputs_.vectors(panel) * kernels_.lanes;
      const Segment outputs{0, outputs_.valid(panel)};
      for (int rows = 0; rows < rows_.count(); ++rows) {
        const int columns = rows_.vectors(rows) * kernels_.lanes;
        GemmCall gemm{};
        gemm.a = packed + int64_t{outputs_.first(panel)} * problem_.inputs + int64_t{first} * width;
        gemm.row_stride = width;
        gemm.rows = count;
        gemm.segments = &outputs;
        gemm.segment_count = 1;
        gemm.b = dz_transposed_ + int64_t{rows_.first(rows)} * outputs_.padded() +
                 int64_t{outputs_.first(panel)} * columns;
        gemm.vectors = rows_.vectors(rows);
        gemm.c = w.sums + int64_t{rows_.first(rows)} * kInputsPerJob;
        gemm.c_stride = columns;
        gemm.accumulate = panel > 0;
        kernels_.gemm(gemm);
      }
    }
    for (int rows = 0; rows < rows_.count(); ++rows) {
      const int columns = rows_.vectors(rows) * kernels_.lanes;
      // Transposed on the way out: "pixels" are inputs, "channels" rows of the batch.
      write_rows(kernels_, problem_.dtype, w.sums + int64_t{rows_.first(rows)} * kInputsPerJob,
                 columns, count, rows_.valid(rows), call.input_gradient,
                 int64_t{rows_.first(rows)} * problem_.inputs + first, 1, problem_.inputs);
    }
  }

  // dW[output][a panel of inputs] = sum over rows of dz[row][output] x[row][input].
  void weight_gradient(const BackwardCall& call, int panel, const Worker& w) const {
    const int width = inputs_.vectors(panel) * kernels_.lanes, valid = inputs_.valid(panel);
    read_rows(kernels_, problem_.dtype, call.input, nullptr, problem_.inputs, inputs_.first(panel),
              problem_.rows, valid, width, w.panel, width);
    const Segment batch{0, static_cast<int>(problem_.rows)};
    const bool in_place = problem_.dtype == DType::kFloat32 && valid == width;
    OuterCall outer{};
    outer.step = outputs_.padded();
    outer.segments = &batch;
    outer.segment_count = 1;
    outer.b = w.panel;
    outer.vectors = inputs_.vectors(panel);
    for (int first = 0; first < problem_.outputs; first += kOutputsPerPass) {
      outer.a = dz_ + first;
      outer.columns = std::min(kOutputsPerPass, problem_.outputs - first);
      const int64_t at = int64_t{first} * problem_.inputs + inputs_.first(panel);
      outer.c = in_place ? static_cast<float*>(call.weight_gradient) + at : w.sums;
      outer.c_stride = in_place ? problem_.inputs : width;
      kernels_.outer(outer);
      if (!in_place) {
        write_rows(kernels_, problem_.dtype, w.sums, width, outer.columns, valid,
                   call.weight_gradient, at, problem_.inputs, 1);
      }
    }
  }

  const ConvKernels& kernels_;
  const Problem& problem_;
  const int threads_;
  const Panels outputs_, rows_, inputs_;
  float *dz_, *dz_transposed_, *db_;
  char* workers_;
  size_t worker_bytes_, bytes_;
};

}  // namespace

size_t Plan::packed_bytes() const {
  const Panels panels{problem_.outputs, kernels_->lanes};
  return align_up(sizeof(float) * panels.padded() * problem_.inputs);
}

size_t Plan::scratch_bytes() const {
  return std::max(Forward(*kernels_, problem_, threads_, nullptr).bytes(),
                  Backward(*kernels_, problem_, threads_, nullptr).bytes());
}

void Plan::pack(const void* weight, void* packed) const {
  const Panels panels{problem_.outputs, kernels_->lanes};
  run_jobs(panels.count(), threads_, [&](int, int64_t job) {
    const int panel = static_cast<int>(job), first = panels.first(panel);
    const int width = panels.vectors(panel) * kernels_->lanes;
    float* out = static_cast<float*>(packed) + int64_t{first} * problem_.inputs;
    if (panels.valid(panel) < width) {
      std::fill_n(out, int64_t{width} * problem_.inputs, 0.0f);
    }
    // Transposed in squares: "pixels" are inputs, "channels" outputs.
    GatherCall call{};
    call.data = element_at(weight, problem_.dtype, int64_t{first} * problem_.inputs);
    call.dtype = problem_.dtype;
    call.pixel_stride = 1;
    call.channel_stride = problem_.inputs;
    call.pixels = problem_.inputs;
    call.channels = panels.valid(panel);
    call.padded_channels = width;
    call.out = out;
    call.out_stride = width;
    kernels_->gather(call);
  });
}

void Plan::forward(const ForwardCall& call) const {
  if (problem_.rows == 0) return;
  Forward(*kernels_, problem_, threads_, static_cast<char*>(call.scratch)).run(call);
}

void Plan::backward(const BackwardCall& call) const {
  Backward(*kernels_, problem_, threads_, static_cast<char*>(call.scratch)).run(call);
}

}  // namespace fastalex::cpu::linear

// Linear + bias + ReLU and its gradients on the convolution's micro-kernels.
#include "linear.h"

#include "conv/arena.h"
#include "conv/gradient.h"
#include "conv/panels.h"
#include "conv/workers.h"

namespace fastalex::cpu::linear {
namespace {

using conv::Arena;
using conv::ceil_div;
using conv::ConvKernels;
using conv::DotCall;
using conv::element_at;
using conv::GatherCall;
using conv::GemmCall;
using conv::OuterCall;
using conv::Panels;
using conv::run_jobs;
using conv::ScatterCall;
using conv::Segment;

constexpr int64_t kRowsPerJob = 128;  // of the batch: their slice of any operand stays in L2

void write_rows(const ConvKernels& kernels, DType dtype, const float* data, ptrdiff_t data_stride,
                int64_t rows, int columns, void* out, int64_t first, int64_t stride) {
  ScatterCall call{};
  call.data = data;
  call.data_stride = data_stride;
  call.pixels = rows;
  call.channels = columns;
  call.out = element_at(out, dtype, first);
  call.dtype = dtype;
  call.pixel_stride = stride;
  call.channel_stride = 1;
  kernels.scatter(call);
}

// A matrix's rows as float in panels of columns, [panel][row][panel width]; row by row, for the
// sake of whoever fetches them from memory.
void read_panels(const ConvKernels& kernels, DType dtype, const void* data, int64_t first,
                 int64_t stride, int rows, const Panels& panels, float* out) {
  const int width = panels.width();
  const int whole = panels.filters / width;
  GatherCall call{};
  call.dtype = dtype;
  call.channel_stride = 1;
  if (whole > 0) {
    call.pixel_stride = width;
    call.pixels = whole;
    call.channels = call.padded_channels = width;
    call.out_stride = ptrdiff_t{rows} * width;
    for (int row = 0; row < rows; ++row) {
      call.data = element_at(data, dtype, first + row * stride);
      call.out = out + int64_t{row} * width;
      kernels.gather(call);
    }
  }
  if (whole < panels.count()) {
    call.data = element_at(data, dtype, first + int64_t{whole} * width);
    call.pixel_stride = stride;
    call.pixels = rows;
    call.channels = panels.valid(whole);
    call.padded_channels = panels.vectors(whole) * panels.lanes;
    call.out = out + int64_t{rows} * panels.first(whole);
    call.out_stride = call.padded_channels;
    kernels.gather(call);
  }
}

// Asks for rows [first, last) of a strip of a matrix, so that they wait in L2 when they are read: a
// strip's rows lie too far apart for the processor to see them coming.
void fetch_rows(const void* data, int64_t row_bytes, int64_t strip_bytes, int first, int last) {
  constexpr int64_t kLine = 64;
  const char* row = static_cast<const char*>(data) + first * row_bytes;
  for (int i = first; i < last; ++i, row += row_bytes) {
    for (int64_t at = 0; at < strip_bytes; at += kLine) __builtin_prefetch(row + at, 0, 2);
  }
}

// The forward pass: a job is a few rows of weights times up to kRowsPerJob rows of the batch.
class Forward {
 public:
  Forward(const ConvKernels& kernels, const Problem& problem, int threads, char* scratch)
      : kernels_(kernels),
        problem_(problem),
        threads_(threads),
        panel_rows_(std::min(kRowsPerJob, problem.rows)),
        // Rows a power of two apart would share one set of the cache.
        row_bytes_(conv::align_up(problem.inputs * conv::element_size(problem.dtype)) + kLine) {
    Arena arena(scratch);
    rows_ = reinterpret_cast<char*>(arena.take(problem.rows * row_bytes_ / sizeof(float)));
    workers_ = scratch ? scratch + arena.bytes() : nullptr;
    Arena measure;
    worker(measure);
    worker_bytes_ = measure.bytes();
    bytes_ = arena.bytes() + threads * worker_bytes_;
  }

  size_t bytes() const { return bytes_; }

  void run(const ForwardCall& call) const {
    const int64_t dense = problem_.inputs * conv::element_size(problem_.dtype);
    // No inputs: nothing to copy, and perhaps no memory to copy from.
    parallel_for(dense > 0 ? problem_.rows : 0, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        std::memcpy(rows_ + row * row_bytes_, static_cast<const char*>(call.input) + row * dense,
                    dense);
      }
    });
    const int64_t groups = ceil_div(problem_.outputs, kernels_.dot_outputs);
    const int64_t panels = ceil_div(problem_.rows, kRowsPerJob);
    run_jobs(groups * panels, threads_, [&](int index, int64_t job) {
      Arena arena(workers_ + index * worker_bytes_);
      run_job(call, job / groups * kRowsPerJob,
              static_cast<int>(job % groups) * kernels_.dot_outputs, worker(arena));
    });
  }

 private:
  // Elements of a row at a time: a group's weights then wait in L1 for every row of the batch.
  static constexpr int kDepth = 1024;
  static constexpr int64_t kLine = 64;

  struct Worker {
    float* sums;  // a vector for each row and output
    float* results;
  };
  Worker worker(Arena& arena) const {
    // Sums are added up a square of vectors at a time.
    const int64_t count =
        ceil_div(panel_rows_ * kernels_.dot_outputs, kernels_.lanes) * kernels_.lanes;
    return {arena.take(count * kernels_.lanes), arena.take(count)};
  }

  void run_job(const ForwardCall& call, int64_t row, int output, const Worker& w) const {
    const int outputs = std::min(kernels_.dot_outputs, problem_.outputs - output);
    const int64_t rows = std::min(panel_rows_, problem_.rows - row);
    const int64_t count = ceil_div(rows * kernels_.dot_outputs, kernels_.lanes) * kernels_.lanes;
    start_sums(call, output, outputs, count, w.sums);
    DotCall dot{};
    dot.dtype = problem_.dtype;
    dot.x_stride = row_bytes_ / conv::element_size(problem_.dtype);
    dot.w_stride = problem_.inputs;
    dot.rows = rows;
    dot.outputs = outputs;
    dot.sums = w.sums;
    for (int first = 0; first < problem_.inputs; first += kDepth) {
      dot.x = element_at(rows_, problem_.dtype, row * dot.x_stride + first);
      dot.w = element_at(call.weight, problem_.dtype, int64_t{output} * problem_.inputs + first);
      dot.length = std::min(kDepth, problem_.inputs - first);
      kernels_.dot(dot);
    }
    kernels_.add_lanes(w.sums, count, problem_.relu, w.results);
    write_rows(kernels_, problem_.dtype, w.results, kernels_.dot_outputs, rows, outputs,
               call.output, row * problem_.outputs + output, problem_.outputs);
  }

  // Each sum starts as its bias, in the first lane.
  void start_sums(const ForwardCall& call, int output, int outputs, int64_t count,
                  float* sums) const {
    std::fill_n(sums, count * kernels_.lanes, 0.0f);
    if (!call.bias) return;
    for (int o = 0; o < outputs; ++o) {
      const float bias = conv::read_element(call.bias, problem_.dtype, output + o);
      for (int64_t i = o; i < count; i += kernels_.dot_outputs) sums[i * kernels_.lanes] = bias;
    }
  }

  const ConvKernels& kernels_;
  const Problem& problem_;
  const int threads_;
  const int64_t panel_rows_;
  const int64_t row_bytes_;
  char *rows_, *workers_;
  size_t worker_bytes_, bytes_;
};

// Both gradients, and the bias's.
class Backward {
 public:
  Backward(const ConvKernels& kernels, const Problem& problem, int threads, char* scratch)
      : kernels_(kernels),
        problem_(problem),
        threads_(threads),
        panel_rows_(std::min(kRowsPerJob, problem.rows)),
        columns_(columns_per_job()),
        outputs_{problem.outputs, kernels.lanes},
        // Not a power of two: a column of dz would share one set of the cache.
        dz_stride_(outputs_.padded() + kernels.lanes) {
    Arena arena(scratch);
    dz_ = arena.take(problem.rows * dz_stride_);
    db_ = arena.take(outputs_.padded());
    workers_ = scratch ? scratch + arena.bytes() : nullptr;
    Arena measure;
    worker(measure);
    worker_bytes_ = measure.bytes();
    bytes_ = arena.bytes() + threads * worker_bytes_;
  }

  size_t bytes() const { return bytes_; }

  void run(const BackwardCall& call) const {
    run_jobs(outputs_.count(), threads_,
             [&](int, int64_t panel) { read_gradient(call, static_cast<int>(panel)); });
    if (call.input_gradient) {
      const int64_t strips = ceil_div(problem_.inputs, kStrip);
      run_jobs(strips * ceil_div(problem_.rows, kRowsPerJob), threads_,
               [&](int index, int64_t job) {
                 Arena arena(workers_ + index * worker_bytes_);
                 input_gradient(call, job / strips * kRowsPerJob,
                                static_cast<int>(job % strips) * kStrip, worker(arena));
               });
    }
    if (call.weight_gradient) {
      const int64_t strips = ceil_div(problem_.inputs, columns_);
      run_jobs(strips * ceil_div(problem_.outputs, kOutputsPerJob), threads_,
               [&](int index, int64_t job) {
                 Arena arena(workers_ + index * worker_bytes_);
                 weight_gradient(call, static_cast<int>(job / strips) * kOutputsPerJob,
                                 static_cast<int>(job % strips) * columns_, worker(arena));
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
  static constexpr int kStrip = 256;          // inputs of one job of the input gradient
  static constexpr int kDepth = 64;           // outputs whose weights it holds at a time, in L2
  static constexpr int kOutputsPerJob = 512;  // of the weight gradient
  static constexpr int kOutputsPerBlock = 8;  // whose rows are written side by side
  static constexpr int64_t kCacheFloats = 1 << 15;  // the batch's slice that stays in L2

  struct Worker {
    float* panels;  // of weights, or of the batch
    float* sums;    // of a strip of the input gradient, or one product of the weight gradient
  };
  Worker worker(Arena& arena) const {
    return {
        arena.take(std::max<int64_t>(kDepth * kStrip, problem_.rows * columns_)),
        arena.take(std::max<int64_t>(panel_rows_ * kStrip, kOutputsPerBlock * outputs_.width()))};
  }

  int columns_per_job() const {
    const int64_t fitting = kCacheFloats / std::max<int64_t>(1, problem_.rows);
    const int width = 2 * kernels_.lanes;
    return static_cast<int>(std::clamp<int64_t>(fitting / width * width, width, 1024));
  }

  // dz of a panel of outputs, and its column sums.
  void read_gradient(const BackwardCall& call, int panel) const {
    const int first = outputs_.first(panel), width = outputs_.vectors(panel) * kernels_.lanes;
    GatherCall gather{};
    gather.data = element_at(call.gradient, problem_.dtype, first);
    gather.dtype = problem_.dtype;
    gather.pixel_stride = gather.mask_pixel_stride = problem_.outputs;
    gather.channel_stride = gather.mask_channel_stride = 1;
    gather.mask = call.output ? element_at(call.output, problem_.dtype, first) : nullptr;
    gather.pixels = problem_.rows;
    gather.channels = outputs_.valid(panel);
    gather.padded_channels = width;
    gather.out = dz_ + first;
    gather.out_stride = dz_stride_;
    kernels_.gather(gather);
    for (int i = 0; i < width; ++i) db_[first + i] = 0.0f;
    for (int64_t row = 0; row < problem_.rows; ++row) {
      for (int i = 0; i < width; ++i) db_[first + i] += dz_[row * dz_stride_ + first + i];
    }
  }

  // dx[row][a strip of inputs] = sum over outputs of dz[row][output] W[output][input].
  void input_gradient(const BackwardCall& call, int64_t row, int column, const Worker& w) const {
    const Panels panels{std::min(kStrip, problem_.inputs - column), kernels_.lanes};
    GemmCall gemm{};
    gemm.row_stride = dz_stride_;
    gemm.rows = std::min(panel_rows_, problem_.rows - row);
    gemm.segment_count = 1;
    const int64_t element_bytes = conv::element_size(problem_.dtype);
    for (int first = 0; first < problem_.outputs; first += kDepth) {
      const Segment outputs{0, std::min(kDepth, problem_.outputs - first)};
      read_panels(kernels_, problem_.dtype, call.weight, int64_t{first} * problem_.inputs + column,
                  problem_.inputs, outputs.length, panels, w.panels);
      gemm.a = dz_ + row * dz_stride_ + first;
      gemm.segments = &outputs;
      gemm.accumulate = first > 0;
      const int next = first + kDepth, ahead = std::clamp(problem_.outputs - next, 0, kDepth);
      for (int panel = 0; panel < panels.count(); ++panel) {
        fetch_rows(
            element_at(call.weight, problem_.dtype, int64_t{next} * problem_.inputs + column),
            problem_.inputs * element_bytes, panels.filters * element_bytes,
            ahead * panel / panels.count(), ahead * (panel + 1) / panels.count());
        gemm.b = w.panels + int64_t{outputs.length} * panels.first(panel);
        gemm.vectors = panels.vectors(panel);
        gemm.c = w.sums + gemm.rows * panels.first(panel);
        gemm.c_stride = gemm.vectors * kernels_.lanes;
        kernels_.gemm(gemm);
      }
    }
    for (int panel = 0; panel < panels.count(); ++panel) {
      write_rows(kernels_, problem_.dtype, w.sums + gemm.rows * panels.first(panel),
                 panels.vectors(panel) * kernels_.lanes, gemm.rows, panels.valid(panel),
                 call.input_gradient, row * problem_.inputs + column + panels.first(panel),
                 problem_.inputs);
    }
  }

  // dW[a block of outputs][a strip of inputs] = sum over rows of dz[row][output] x[row][input],
  // block after block, so that memory is written in long runs.
  void weight_gradient(const BackwardCall& call, int output, int column, const Worker& w) const {
    const Panels panels{std::min(columns_, problem_.inputs - column), kernels_.lanes};
    const Segment batch{0, static_cast<int>(problem_.rows)};
    read_panels(kernels_, problem_.dtype, call.input, column, problem_.inputs, batch.length, panels,
                w.panels);
    OuterCall outer{};
    outer.step = dz_stride_;
    outer.segments = &batch;
    outer.segment_count = 1;
    const int end = std::min(output + kOutputsPerJob, problem_.outputs);
    for (int first = output; first < end; first += kOutputsPerBlock) {
      outer.a = dz_ + first;
      outer.columns = std::min(kOutputsPerBlock, end - first);
      for (int panel = 0; panel < panels.count(); ++panel) {
        const int width = panels.vectors(panel) * kernels_.lanes, valid = panels.valid(panel);
        const int64_t at = int64_t{first} * problem_.inputs + column + panels.first(panel);
        const bool in_place = problem_.dtype == DType::kFloat32 && valid == width;
        outer.b = w.panels + int64_t{batch.length} * panels.first(panel);
        outer.vectors = panels.vectors(panel);
        outer.c = in_place ? static_cast<float*>(call.weight_gradient) + at : w.sums;
        outer.c_stride = in_place ? problem_.inputs : width;
        kernels_.outer(outer);
        if (!in_place) {
          write_rows(kernels_, problem_.dtype, w.sums, width, outer.columns, valid,
                     call.weight_gradient, at, problem_.inputs);
        }
      }
    }
  }

  const ConvKernels& kernels_;
  const Problem& problem_;
  const int threads_;
  const int64_t panel_rows_;
  const int columns_;
  const Panels outputs_;
  const int64_t dz_stride_;
  float *dz_, *db_;
  char* workers_;
  size_t worker_bytes_, bytes_;
};

}  // namespace

size_t Plan::forward_scratch_bytes() const {
  return Forward(*kernels_, problem_, threads_, nullptr).bytes();
}

size_t Plan::backward_scratch_bytes() const {
  return Backward(*kernels_, problem_, threads_, nullptr).bytes();
}

void Plan::forward(const ForwardCall& call) const {
  Forward(*kernels_, problem_, threads_, static_cast<char*>(call.scratch)).run(call);
}

void Plan::backward(const BackwardCall& call) const {
  Backward(*kernels_, problem_, threads_, static_cast<char*>(call.scratch)).run(call);
}

}  // namespace fastalex::cpu::linear

// fastalex_cpu::conv_relu_pool: convolution, ReLU, perhaps LRN, and max-pooling, a few images at a
// time, so that the convolution's map is pooled while it lies in cache. Stable ABI only.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "conv/scalar.h"
#include "conv_call.h"
#include "kept_memory.h"
#include "library.h"
#include "parallel.h"
#include "pool_numbers.h"

namespace fastalex::cpu {
namespace {

using conv::element_size;

// What follows the convolution.
struct Pooling {
  bool normalise;
  LrnParams lrn;
  PoolParams pool;

  void run(DType dtype, const Map& map, const Map& output) const {
    const MaxPoolCall call{dtype, pool, map, output, {}};
    if (normalise && map.height * map.width == 1) {
      run_pixels(dtype, map, output);
    } else if (normalise) {
      kernels().lrn_max_pool({lrn, call});
    } else {
      kernels().max_pool(call);
    }
  }

 private:
  // A map of one pixel is a plane to the operators, whatever layout it came in, and a plane's
  // channels are summed in another order than a pixel's.
  void run_pixels(DType dtype, const Map& map, const Map& output) const {
    std::vector<char> normalised(map.batch * map.channels * element_size(dtype));
    Map planes = map;
    planes.channels_last = false;
    planes.channel_stride = planes.row_stride = planes.pixel_stride = 1;
    Map result = planes;
    result.data = normalised.data();
    kernels().lrn({dtype, lrn, planes, result});
    result.channels_last = output.channels_last;
    result.row_stride = result.pixel_stride = output.channels_last ? map.channels : 1;
    kernels().max_pool({dtype, pool, result, output, {}});
  }
};

// Images [first, first + count) of a map.
Map images_of(const Map& map, DType dtype, int64_t first, int64_t count) {
  Map part = map;
  part.data = static_cast<char*>(map.data) + first * map.batch_stride * element_size(dtype);
  part.batch = count;
  return part;
}

// A dense map of `images` images of the convolution's.
Map dense_map(const conv::Problem& p, bool channels_last, int64_t images, void* data) {
  const int64_t channels = p.out_channels, height = p.out_height(), width = p.out_width();
  Map map{.data = data,
          .batch = images,
          .channels = channels,
          .height = height,
          .width = width,
          .batch_stride = channels * height * width,
          .channel_stride = height * width,
          .row_stride = width,
          .pixel_stride = 1,
          .channels_last = channels_last};
  if (channels_last) {
    map.channel_stride = 1;
    map.row_stride = width * channels;
    map.pixel_stride = channels;
  }
  return map;
}

class ConvPoolRun {
 public:
  ConvPoolRun(const conv::Problem& problem, const Pooling& pooling, const Tensor& input,
              const Tensor& weight, const std::optional<Tensor>& bias, const Map& output)
      : problem_(problem),
        pooling_(pooling),
        output_(output),
        plan_(plan_of(problem, conv::Pass::kForward)),
        weight_(dense_weight(weight)),
        packed_(packed_weights(*plan_, problem.dtype, weight_)),
        bias_(bias) {
    call_.input = conv_view(input);
    call_.weight = conv_view(weight_);
    call_.bias = bias_ ? bias_->data_ptr() : nullptr;
    call_.packed = packed_->data();
  }

  // Images go to a worker each while there is one for every worker, for an idle worker costs more
  // than the map's way to memory; and where the engine's floats are the map that the pool reads.
  void run() {
    const bool as_it_is = problem_.dtype == DType::kFloat32 && output_.channels_last;
    const int64_t alone = as_it_is ? problem_.batch - problem_.batch % thread_count() : 0;
    if (alone > 0) run_by_image(alone);
    run_by_block(alone);
  }

 private:
  // A worker makes an image in its own cache, and pools it there.
  void run_by_image(int64_t images) {
    conv::Problem problem = problem_;
    problem.batch = images;
    problem.by_image = true;
    const auto plan = plan_like(problem);
    {
      const ScratchLease scratch(plan->scratch_bytes());
      call_.scratch = scratch.data();
      call_.sink.context = this;
      call_.sink.image = [](void* context, int, int64_t image, const float* data) {
        auto& run = *static_cast<ConvPoolRun*>(context);
        if (data == nullptr) {
          const std::lock_guard lock(run.mutex_);
          run.lost_.push_back(image);
          return;
        }
        const Map map = dense_map(run.problem_, true, 1, const_cast<float*>(data));
        run.pooling_.run(run.problem_.dtype, map,
                         images_of(run.output_, run.problem_.dtype, image, 1));
      };
      plan->forward(call_);
    }
    for (int64_t image : lost_) run_block(image, 1);
  }

  void run_by_block(int64_t begin) const {
    const int64_t rest = problem_.batch - begin;
    if (rest == 0) return;
    const int64_t fitting = std::clamp<int64_t>(kBlockBytes / image_bytes(), 1, rest);
    const int64_t blocks = (rest + fitting - 1) / fitting;
    const int64_t images = (rest + blocks - 1) / blocks;
    for (int64_t first = begin; first < problem_.batch; first += images) {
      run_block(first, std::min(images, problem_.batch - first));
    }
  }

  // All workers make some images in scratch that stays in the last-level cache, then pool them.
  void run_block(int64_t first, int64_t images) const {
    conv::Problem problem = problem_;
    problem.batch = images;
    const auto plan = plan_like(problem);
    const size_t offset = (plan->scratch_bytes() + 63) / 64 * 64;
    const ScratchLease scratch(offset + images * image_bytes());
    const Map map = dense_map(problem, output_.channels_last, images, scratch.data() + offset);
    conv::ForwardCall call = call_;
    call.input.data = static_cast<const char*>(call.input.data) +
                      first * call.input.strides.n * int64_t(element_size(problem.dtype));
    call.output = {map.data,
                   {map.batch_stride, map.channel_stride, map.row_stride, map.pixel_stride}};
    call.scratch = scratch.data();
    plan->forward(call);
    pooling_.run(problem.dtype, map, images_of(output_, problem.dtype, first, images));
  }

  int64_t image_bytes() const {
    return dense_map(problem_, true, 1, nullptr).batch_stride *
           int64_t(element_size(problem_.dtype));
  }

  // On the engine and tile of the whole batch: so the weights are packed once, and every bit is
  // what the convolution by itself gives.
  std::shared_ptr<const conv::Plan> plan_like(const conv::Problem& problem) const {
    return plan_for(problem, conv::Pass::kForward, plan_->engine(), plan_->tile());
  }

  static constexpr int64_t kBlockBytes = 6 << 20;

  const conv::Problem problem_;
  const Pooling& pooling_;
  const Map output_;
  const std::shared_ptr<const conv::Plan> plan_;
  const Tensor weight_;
  const std::shared_ptr<const Buffer> packed_;
  const std::optional<Tensor> bias_;
  conv::ForwardCall call_{};
  std::mutex mutex_;
  std::vector<int64_t> lost_;  // images that met too many NaNs, guarded by the mutex
};

Tensor conv_relu_pool(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                      const Tensor& packed_numbers) {
  Numbers numbers(packed_numbers, kGeometryNumbers + kLrnNumbers + kPoolNumbers + 1);
  const conv::Problem problem = conv_problem(input, weight, numbers);
  Pooling pooling;
  pooling.lrn = take_unchecked_lrn(numbers);
  pooling.normalise = pooling.lrn.size != 0;
  if (pooling.normalise) check_lrn(pooling.lrn, problem.out_channels);
  pooling.pool = take_undilated_pool(numbers);
  const bool ceil_mode = numbers.integer() != 0;
  const PoolParams& pool = pooling.pool;
  const int64_t sizes[] = {
      problem.batch, problem.out_channels,
      pooled_size(problem.out_height(), pool.kernel_h, pool.stride_h, pool.padding_h, 1, ceil_mode),
      pooled_size(problem.out_width(), pool.kernel_w, pool.stride_w, pool.padding_w, 1, ceil_mode)};
  const auto bias_row = channel_row(bias, "bias", input, weight);
  const Activation output = create(dtype_code(input), Sizes(sizes, 4), is_channels_last(input));
  if (problem.batch > 0) {
    ConvPoolRun(problem, pooling, input, weight, bias_row, output.map).run();
  }
  return output.tensor;
}

}  // namespace
}  // namespace fastalex::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastalex_cpu, m) {
  // numbers: stride, padding, dilation, groups; of lrn size (0: no normalization), scale, beta, k,
  // groups; of the pool kernel, stride, padding, dilation; ceil_mode.
  m.def("conv_relu_pool(Tensor input, Tensor weight, Tensor? bias, Tensor numbers) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastalex_cpu, CPU, m) {
  m.impl("conv_relu_pool", TORCH_BOX(&fastalex::cpu::conv_relu_pool));
}

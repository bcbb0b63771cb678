// conv_relu and its gradients as sequences of kernels.
#include "conv_run.h"

namespace fastalex {
namespace {

template <class T>
void run_job(Element<T> element, const ConvJob& job, bool tf32, Stream stream) {
  if (job.pack.total) launch<pack_weight<T>>(part_shape(job.pack.total), stream, job.pack);
  run_conv(element, job, tf32, stream);
  if (job.plan.partial)
    launch<reduce_splits<T>>(part_shape(job.reduce.outer * job.reduce.inner), stream, job.reduce);
}

// The masked gradient: [pixel][group][padded channels], so that every copy of it is aligned.
struct MaskJob {
  MaskPlan plan = {};
  BiasPlan bias = {};
  LaunchShape shape = {};
  View dz = {};  // as an image of groups * padded channels
};

MaskJob make_mask_job(DType dtype, const View& grad, const View& output, const ConvParams& params,
                      void* grad_bias, Workspace& workspace) {
  MaskJob job;
  MaskPlan& p = job.plan;
  p.grad = grad.data, p.output = params.relu ? output.data : nullptr,
  p.grad_stride = grad.strides(), p.output_stride = output.strides();
  p.groups = params.groups,
  p.channels = to_int(output.size[1] / params.groups, "the number of channels");
  p.padded = static_cast<int>(ceil_div(p.channels, wide_values(dtype))) * wide_values(dtype);
  p.height = to_int(output.size[2], "a side"), p.width = to_int(output.size[3], "a side");
  p.pixels =
      to_int(output.size[0] * output.size[2] * output.size[3], "the number of output pixels");
  const long long columns = static_cast<long long>(p.groups) * p.padded;
  p.span = static_cast<int>(std::max(16ll, ceil_div(p.pixels, 1024)));
  const long long spans = ceil_div(p.pixels, p.span),
                  channel_blocks = ceil_div(columns, kPartThreads);
  p.by_width = fast_divide(p.width), p.by_height = fast_divide(p.height),
  p.by_padded = fast_divide(p.padded);
  p.by_channel_blocks = fast_divide(channel_blocks);
  p.dz = workspace.take(p.pixels * columns * bytes_of(dtype));
  if (grad_bias) {
    p.bias_partial = static_cast<float*>(
        workspace.take(spans * columns * static_cast<long long>(sizeof(float))));
    job.bias = {p.bias_partial, grad_bias, static_cast<int>(spans), p.channels, p.padded, p.groups};
  }
  job.shape = {spans * channel_blocks, kPartThreads, 0};
  job.dz = {p.dz,
            {output.size[0], columns, output.size[2], output.size[3]},
            {columns * p.width * p.height, 1, columns * p.width, columns}};
  return job;
}

struct WeightJob {
  ConvWeightPlan plan = {};
  ReducePlan reduce = {};
  LaunchShape shape = {};
  bool gather = false;
};

WeightJob make_weight_job(DType dtype, const MaskJob& mask, const View& x, const View& weight,
                          const View& grad_weight, const ConvParams& params, Workspace& workspace) {
  WeightJob job;
  ConvWeightPlan& p = job.plan;
  p.x = x.data, p.dz = mask.dz.data, p.x_stride = x.strides(), p.groups = params.groups;
  p.h = conv_axis(params, 0, x.size[2], mask.dz.size[2], weight.size[2]);
  p.w = conv_axis(params, 1, x.size[3], mask.dz.size[3], weight.size[3]);
  p.channels_in = to_int(weight.size[1], "the number of channels"),
  p.channels_out = mask.plan.channels;
  p.pixels = static_cast<int>(mask.plan.pixels), p.dz_group = mask.plan.padded,
  p.dz_pitch = p.groups * p.dz_group;
  p.columns = to_int(weight.size[1] * weight.size[2] * weight.size[3], "the size of a filter");
  const bool wide = dtype != DType::f32;
  using Half = WeightTileOf<__half>;
  using Float = WeightTileOf<float>;
  const int rows = wide ? Half::BlockM : Float::BlockM,
            columns = wide ? Half::BlockN : Float::BlockN;
  const int depth = stage_depth(dtype);
  const long long row_tiles = ceil_div(p.channels_out, rows),
                  column_tiles = ceil_div(p.columns, columns);
  const long long tiles = row_tiles * column_tiles * p.groups;
  const long long splits =
      std::clamp(2ll * kSMs / tiles, 1ll, std::max(ceil_div(p.pixels, 8ll * depth), 1ll));
  p.split_pixels = static_cast<int>(ceil_div(ceil_div(p.pixels, splits), depth) * depth);
  const long long used = ceil_div(p.pixels, p.split_pixels);
  p.by_column_tiles = fast_divide(column_tiles), p.by_row_tiles = fast_divide(row_tiles);
  p.by_groups = fast_divide(p.groups), p.by_out_w = fast_divide(p.w.out),
  p.by_out_h = fast_divide(p.h.out);
  p.by_channels_in = fast_divide(p.channels_in), p.by_kernel_w = fast_divide(p.w.kernel);
  job.shape = {tiles * used, wide ? Half::Threads : Float::Threads,
               wide ? Half::RingBytes : Float::RingBytes};
  const int values = wide_values(dtype);
  job.gather = !(channels_are_dense(x) && p.channels_in % values == 0 &&
                 packs_are_aligned(x, bytes_of(dtype), values, true));

  ReducePlan& r = job.reduce;
  r.outer = static_cast<long long>(p.groups) * p.channels_out, r.inner = p.columns,
  r.split_pitch = r.outer * r.inner;
  p.partial = static_cast<float*>(
      workspace.take(r.split_pitch * used * static_cast<long long>(sizeof(float))));
  r.partial = p.partial, r.out = grad_weight.data, r.splits = static_cast<int>(used),
  r.stride = grad_weight.strides();
  r.kernel_w = p.w.kernel, r.channels_in = p.channels_in, r.weight = 1;
  return job;
}

template <class Math>
void run_weight_grad(const WeightJob& job, Stream stream) {
  using Tile = WeightTileOf<typename Math::Element>;
  job.gather ? launch<conv_weight_grad<Math, Tile, true>>(job.shape, stream, job.plan)
             : launch<conv_weight_grad<Math, Tile, false>>(job.shape, stream, job.plan);
}
template <class T>
void run_weight_job(Element<T>, const WeightJob& job, bool tf32, Stream stream) {
  if constexpr (sizeof(T) == 2)
    run_weight_grad<HalfMath<T>>(job, stream);
  else
    tf32 ? run_weight_grad<Tf32Math>(job, stream) : run_weight_grad<FmaMath>(job, stream);
  launch<reduce_splits<T>>(part_shape(job.reduce.outer * job.reduce.inner), stream, job.reduce);
}

struct BackwardJob {
  MaskJob mask;
  ConvJob input;
  WeightJob weight;
  long long workspace;
};

BackwardJob make_backward_job(DType dtype, const View& grad, const View& output, const View& x,
                              const View& weight, const ConvGradients& wanted,
                              const ConvParams& params, void* base) {
  BackwardJob job;
  Workspace workspace(base);
  job.mask = make_mask_job(dtype, grad, output, params, wanted.bias, workspace);
  if (wanted.input.data)
    job.input =
        make_conv_job(dtype, job.mask.dz, weight, nullptr, wanted.input, params, true, workspace);
  if (wanted.weight.data)
    job.weight = make_weight_job(dtype, job.mask, x, weight, wanted.weight, params, workspace);
  job.workspace = workspace.used();
  return job;
}

bool is_empty(const View& v) { return !v.size[0] || !v.size[1] || !v.size[2] || !v.size[3]; }

}  // namespace

long long conv_relu_workspace(DType dtype, const View& x, const View& weight, const View& y,
                              const ConvParams& conv) {
  if (is_empty(y)) return 0;
  Workspace workspace(nullptr);
  make_conv_job(dtype, x, weight, nullptr, y, conv, false, workspace);
  return workspace.used();
}

void conv_relu(DType dtype, const View& x, const View& weight, const void* bias, const View& y,
               const ConvParams& conv, void* base, Stream stream) {
  if (is_empty(y)) return;
  Workspace workspace(base);
  const ConvJob job = make_conv_job(dtype, x, weight, bias, y, conv, false, workspace);
  visit_dtype(dtype, [&](auto element) { run_job(element, job, conv.tf32, stream); });
}

long long conv_relu_backward_workspace(DType dtype, const View& output, const View& x,
                                       const View& weight, const ConvGradients& wanted,
                                       const ConvParams& conv) {
  if (is_empty(output)) return 0;
  return make_backward_job(dtype, output, output, x, weight, wanted, conv, nullptr).workspace;
}

void conv_relu_backward(DType dtype, const View& grad, const View& output, const View& x,
                        const View& weight, const ConvGradients& wanted, const ConvParams& conv,
                        void* base, Stream stream) {
  if (is_empty(output)) return;
  const BackwardJob job = make_backward_job(dtype, grad, output, x, weight, wanted, conv, base);
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    launch<mask_gradient<T>>(job.mask.shape, stream, job.mask.plan);
    if (wanted.input.data) run_job(element, job.input, conv.tf32, stream);
    if (wanted.weight.data) run_weight_job(element, job.weight, conv.tf32, stream);
    if (wanted.bias)
      launch<sum_bias<T>>({static_cast<long long>(conv.groups) * job.mask.plan.channels,
                           kPartThreads, kPartThreads * static_cast<int>(sizeof(float))},
                          stream, job.mask.bias);
  });
}

}  // namespace fastalex

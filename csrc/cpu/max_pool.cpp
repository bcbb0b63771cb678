// Max-pooling, forward and backward: threads, layouts and dtypes around the row kernels.
#include "op_entries.h"
#include "parallel.h"
#include "pool_pixels.h"
#include "pool_planes.h"

namespace fastalex::cpu::FASTALEX_ISA {
namespace {

TapRange rows_under(const PoolParams& pool, int64_t oh, int64_t in_height) {
  return TapRange(oh * pool.stride_h - pool.padding_h, pool.kernel_h, pool.dilation_h, in_height);
}

template <class S, class Offset, bool kTrack>
void forward_pixels(const MaxPoolCall& call) {
  const Map &in = call.input, &out = call.output;
  const PoolParams& pool = call.pool;
  parallel_for(out.batch * out.height, grain(out.width * out.channels * pool.taps()),
               [&](int64_t begin, int64_t end) {
                 PixelPool<S, Offset, kTrack> kernel(pool, in.width, out);
                 Scratch<const S*> rows(pool.kernel_h);
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t n = i / out.height, oh = i % out.height;
                   const TapRange range = rows_under(pool, oh, in.height);
                   for (int64_t kh = range.first; kh < range.last; ++kh) {
                     const int64_t ih = oh * pool.stride_h - pool.padding_h + kh * pool.dilation_h;
                     rows[kh - range.first] = row_at<const S>(in, n, ih);
                   }
                   kernel.run(rows.data(), range, in.pixel_stride, row_at<S>(out, n, oh),
                              out.pixel_stride,
                              kTrack ? row_at<Offset>(call.offsets, n, oh) : nullptr);
                 }
               });
}

template <class S, class Offset, bool kTrack>
void forward_planes(const MaxPoolCall& call) {
  const Map &in = call.input, &out = call.output;
  const PoolParams& pool = call.pool;
  parallel_for(
      out.batch * out.channels, grain(out.height * out.width * pool.taps()),
      [&](int64_t begin, int64_t end) {
        PlanePool<S, Offset, kTrack> kernel(pool, in.width, out.width);
        Scratch<const S*> rows(pool.kernel_h);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / out.channels, c = i % out.channels;
          const S* plane = plane_at<const S>(in, n, c);
          for (int64_t oh = 0; oh < out.height; ++oh) {
            const TapRange range = rows_under(pool, oh, in.height);
            for (int64_t kh = range.first; kh < range.last; ++kh) {
              const int64_t ih = oh * pool.stride_h - pool.padding_h + kh * pool.dilation_h;
              rows[kh - range.first] = plane + ih * in.row_stride;
            }
            kernel.run(rows.data(), range, plane_at<S>(out, n, c) + oh * out.width,
                       kTrack ? plane_at<Offset>(call.offsets, n, c) + oh * out.width : nullptr);
          }
        }
      });
}

template <class S, class Offset>
void backward_pixels(const MaxPoolBackwardCall& call) {
  const Map &grad = call.grad, &out = call.grad_input;
  parallel_for(out.batch * out.height, grain(out.width * out.channels),
               [&](int64_t begin, int64_t end) {
                 PixelUnpool<S, Offset, S> kernel(call.pool, grad, out.height, out.width);
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t n = i / out.height, ih = i % out.height;
                   kernel.run(n, ih, row_at<const Offset>(call.offsets, n, 0),
                              row_at<S>(out, n, ih), out.pixel_stride);
                 }
               });
}

template <class S, class Offset>
void backward_planes(const MaxPoolBackwardCall& call) {
  using A = compute_t<S>;
  const Map &grad = call.grad, &out = call.grad_input;
  const int64_t pixels = out.height * out.width;
  parallel_for(out.batch * out.channels, grain(pixels), [&](int64_t begin, int64_t end) {
    PlaneUnpool<S, Offset> kernel(call.pool, out.height, out.width);
    Scratch<A> plane(pixels);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / out.channels, c = i % out.channels;
      kernel.run(plane_at<const S>(grad, n, c), plane_at<const Offset>(call.offsets, n, c),
                 grad.height, grad.width, 0, out.height, plane.data());
      S* target = plane_at<S>(out, n, c);
      for (int64_t p = 0; p < pixels; p += kLanes<A>) {
        store_up_to(target + p, load_up_to(plane.data() + p, pixels - p), pixels - p);
      }
    }
  });
}

}  // namespace

void max_pool(const MaxPoolCall& call) {
  visit_dtype(call.dtype, [&](auto storage) {
    visit_offsets(call.pool, call.offsets.data != nullptr, [&](auto offset, auto track) {
      using S = decltype(storage);
      using Offset = decltype(offset);
      call.input.channels_last ? forward_pixels<S, Offset, track()>(call)
                               : forward_planes<S, Offset, track()>(call);
    });
  });
}

void max_pool_backward(const MaxPoolBackwardCall& call) {
  visit_dtype(call.dtype, [&](auto storage) {
    visit_offsets(call.pool, true, [&](auto offset, auto) {
      using S = decltype(storage);
      using Offset = decltype(offset);
      call.grad_input.channels_last ? backward_pixels<S, Offset>(call)
                                    : backward_planes<S, Offset>(call);
    });
  });
}

}  // namespace fastalex::cpu::FASTALEX_ISA

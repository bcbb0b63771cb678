// LRN and max-pooling in one pass, forward and backward: the normalised map never reaches memory.
#include "lrn_max_pool5.h"
#include "lrn_planes5.h"
#include "lrn_rows.h"
#include "op_entries.h"
#include "parallel.h"
#include "pool_pixels.h"
#include "pool_planes.h"

namespace fastalex::cpu::FASTALEX_ISA {
namespace {

// --- channels_last: a ring of normalised rows, each computed once per thread

// Normalised rows [h - capacity + 1, h] of one image, rounded to S, so that the pool compares what
// the unfused pair would compare.
template <class S>
class NormalizedRows {
 public:
  NormalizedRows(const LrnParams& lrn, const Map& in, int64_t capacity)
      : in_(in),
        capacity_(capacity),
        row_size_(in.width * in.channels),
        normalizer_(make_lrn_forward<S>(lrn, in)),
        rows_(capacity * row_size_) {}

  // Makes row h of image n present; rows of an image must be asked for in ascending order.
  const S* get(int64_t n, int64_t h) {
    if (n != image_) {
      image_ = n;
      next_ = h;
    }
    for (next_ = std::max(next_, h - capacity_ + 1); next_ <= h; ++next_) {
      normalizer_->run(row_at<const S>(in_, n, next_), in_.pixel_stride, row(next_), in_.channels,
                       in_.width);
    }
    return row(h);
  }

 private:
  S* row(int64_t h) { return rows_.data() + h % capacity_ * row_size_; }

  const Map& in_;
  int64_t capacity_, row_size_;
  int64_t image_ = -1, next_ = 0;
  std::unique_ptr<LrnForward<S>> normalizer_;
  Scratch<S> rows_;
};

// Rows [begin, end) of outputs, counted over all images. Reads x once (and kernel_h - stride_h rows
// of it again where two threads meet), writes y once.
template <class S, class Offset, bool kTrack>
void pool_rows(const LrnMaxPoolCall& call, int64_t begin, int64_t end) {
  const Map &in = call.pool.input, &out = call.pool.output;
  const PoolParams& pool = call.pool.pool;
  NormalizedRows<S> normalized(call.lrn, in, pool.kernel_h);
  PixelPool<S, Offset, kTrack> kernel(pool, in.width, out);
  Scratch<const S*> rows(pool.kernel_h);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / out.height, oh = i % out.height;
    const int64_t top = oh * pool.stride_h - pool.padding_h;
    const TapRange range(top, pool.kernel_h, 1, in.height);
    for (int64_t kh = range.first; kh < range.last; ++kh) {
      rows[kh - range.first] = normalized.get(n, top + kh);
    }
    kernel.run(rows.data(), range, in.channels, row_at<S>(out, n, oh), out.pixel_stride,
               kTrack ? row_at<Offset>(call.pool.offsets, n, oh) : nullptr);
  }
}

// Whether windows are whole, 3x3 and two apart, over five channels: AlexNet's.
bool has_fast_path(const LrnMaxPoolCall& call) {
  const Map &in = call.pool.input, &out = call.pool.output;
  const PoolParams& p = call.pool.pool;
  return p.kernel_h == 3 && p.kernel_w == 3 && p.stride_h == 2 && p.stride_w == 2 &&
         p.padding_h == 0 && p.padding_w == 0 && 2 * out.height + 1 <= in.height &&
         2 * out.width + 1 <= in.width && LrnWindow<float>(call.lrn, in.channels).is_five();
}

// pool_rows on the fast path; a NaN anywhere in an image's rows sends them the careful way.
template <class S, Beta kBeta>
void pool_rows_fast(const LrnMaxPoolCall& call, int64_t begin, int64_t end) {
  const Map &in = call.pool.input, &out = call.pool.output;
  NormalizedPool5<S, kBeta> kernel(call.lrn, in, out);
  while (begin < end) {
    const int64_t n = begin / out.height, first = begin % out.height;
    const int64_t last = std::min(out.height, first + end - begin);
    const auto row = [&](int64_t h) { return row_at<const S>(in, n, h); };
    bool sound = kernel.template run<RowOfWindow::kFirst>(row(2 * first), nullptr);
    for (int64_t oh = first; oh < last && sound; ++oh) {
      sound = kernel.template run<RowOfWindow::kSecond>(row(2 * oh + 1), nullptr) &&
              kernel.template run<RowOfWindow::kLast>(row(2 * oh + 2), row_at<S>(out, n, oh));
    }
    if (!sound) pool_rows<S, uint8_t, false>(call, begin, begin + last - first);
    begin += last - first;
  }
}

template <class S, class Offset, bool kTrack>
void forward_pixels(const LrnMaxPoolCall& call) {
  const Map &in = call.pool.input, &out = call.pool.output;
  const int64_t least = grain(in.width * in.channels * call.pool.pool.stride_h);
  const auto in_parallel = [&](auto&& rows) {
    parallel_for(out.batch * out.height, least,
                 [&](int64_t begin, int64_t end) { rows(call, begin, end); });
  };
  if constexpr (!kTrack) {
    if (has_fast_path(call)) {
      return with_beta(call.lrn.beta, [&](auto beta) { in_parallel(pool_rows_fast<S, beta()>); });
    }
  }
  in_parallel(pool_rows<S, Offset, kTrack>);
}

template <class S, class Offset>
void backward_pixels(const LrnMaxPoolBackwardCall& call) {
  using A = compute_t<S>;
  const Map &in = call.input, &out = call.pool.grad_input;
  parallel_for(
      in.batch * in.height, grain(in.width * in.channels), [&](int64_t begin, int64_t end) {
        PixelUnpool<S, Offset, A> unpool(call.pool.pool, call.pool.grad, in.height, in.width);
        const auto gradient = make_lrn_backward<S, A>(call.lrn, in);
        Scratch<A> row(in.width * in.channels);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / in.height, h = i % in.height;
          unpool.run(n, h, row_at<const Offset>(call.pool.offsets, n, 0), row.data(), in.channels);
          gradient->run(row.data(), in.channels, row_at<const S>(in, n, h), in.pixel_stride,
                        row_at<S>(out, n, h), out.pixel_stride, in.width);
        }
      });
}

// --- NCHW: bands of rows, normalised into a scratch that stays in cache and pooled from there

// Rows of a band whose `channels` planes fill `elements`.
int64_t band_rows(const Map& map, int64_t channels, int64_t elements) {
  return std::max<int64_t>(1, elements / std::max<int64_t>(1, channels * map.width));
}

// Rows [first, last) of an image's input.
struct Band {
  int64_t n, first, last;
};

// All channels of a band at a time, for any window.
template <class S>
class WholeBands {
 public:
  static constexpr int64_t kElements = 128 * 1024;  // about half of a 1 MiB L2

  WholeBands(const LrnParams& lrn, const Map& in)
      : in_(in), normalizer_(make_lrn_forward<S>(lrn, in)) {}

  static int64_t channels(const Map& in) { return in.channels; }

  // Calls pool(c, normalised rows) for each channel.
  template <class Pool>
  void run(const Band& band, S* scratch, Pool&& pool) {
    const int64_t pitch = (band.last - band.first) * in_.width;
    normalizer_->run(plane_at<const S>(in_, band.n, 0) + band.first * in_.width, in_.channel_stride,
                     scratch, pitch, pitch);
    for (int64_t c = 0; c < in_.channels; ++c) pool(c, scratch + c * pitch);
  }

 private:
  const Map& in_;
  std::unique_ptr<LrnForward<S>> normalizer_;
};

// A few channels of a band at a time, for windows of five: larger bands, in a nearer cache.
template <class S, Beta kBeta>
class SlicedBands {
 public:
  static constexpr int64_t kElements = 12 * 1024;

  SlicedBands(const LrnParams& lrn, const Map& in)
      : in_(in), group_channels_(in.channels / lrn.groups), normalizer_(lrn, in.channels) {}

  static int64_t channels(const Map&) { return kSlice; }

  template <class Pool>
  void run(const Band& band, S* scratch, Pool&& pool) {
    const int64_t pitch = (band.last - band.first) * in_.width;
    for (int64_t group = 0; group < in_.channels; group += group_channels_) {
      const S* x = plane_at<const S>(in_, band.n, group) + band.first * in_.width;
      for (int64_t c = 0; c < group_channels_; c += kSlice) {
        for (int64_t i = 0; i < pitch; i += kPlaneBlock) {
          normalizer_.run_slice(x + i, in_.channel_stride, c, scratch + i, pitch,
                                std::min(kPlaneBlock, pitch - i));
        }
        for (int64_t j = 0; j < std::min(kSlice, group_channels_ - c); ++j) {
          pool(group + c + j, scratch + j * pitch);
        }
      }
    }
  }

 private:
  const Map& in_;
  int64_t group_channels_;
  PlaneNormalizer5<S, kBeta> normalizer_;
};

template <class S, class Offset, bool kTrack, class Bands>
void pool_bands(const LrnMaxPoolCall& call) {
  const Map &in = call.pool.input, &out = call.pool.output;
  const PoolParams& pool = call.pool.pool;
  const int64_t channels = Bands::channels(in), most = band_rows(in, channels, Bands::kElements);
  const int64_t out_rows =
      std::clamp<int64_t>((most - pool.kernel_h) / pool.stride_h + 1, 1, out.height);
  const int64_t in_rows = (out_rows - 1) * pool.stride_h + pool.kernel_h;
  const int64_t bands = (out.height + out_rows - 1) / out_rows;
  parallel_for(
      out.batch * bands, grain(in_rows * in.width * in.channels), [&](int64_t begin, int64_t end) {
        Bands normalized(call.lrn, in);
        PlanePool<S, Offset, kTrack> kernel(pool, in.width, out.width);
        Scratch<S> scratch(channels * in_rows * in.width);
        Scratch<const S*> rows(pool.kernel_h);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / bands, oh_first = i % bands * out_rows;
          const int64_t oh_last = std::min(out.height, oh_first + out_rows);
          const Band band{
              n, std::max<int64_t>(0, oh_first * pool.stride_h - pool.padding_h),
              std::min(in.height, (oh_last - 1) * pool.stride_h - pool.padding_h + pool.kernel_h)};
          normalized.run(band, scratch.data(), [&](int64_t c, const S* plane) {
            for (int64_t oh = oh_first; oh < oh_last; ++oh) {
              const int64_t top = oh * pool.stride_h - pool.padding_h;
              const TapRange range(top, pool.kernel_h, 1, in.height);
              for (int64_t kh = range.first; kh < range.last; ++kh) {
                rows[kh - range.first] = plane + (top + kh - band.first) * in.width;
              }
              kernel.run(
                  rows.data(), range, plane_at<S>(out, n, c) + oh * out.width,
                  kTrack ? plane_at<Offset>(call.pool.offsets, n, c) + oh * out.width : nullptr);
            }
          });
        }
      });
}

template <class S, class Offset, bool kTrack>
void forward_planes(const LrnMaxPoolCall& call) {
  if (!LrnWindow<float>(call.lrn, call.pool.input.channels).is_five()) {
    return pool_bands<S, Offset, kTrack, WholeBands<S>>(call);
  }
  with_beta(call.lrn.beta,
            [&](auto beta) { pool_bands<S, Offset, kTrack, SlicedBands<S, beta()>>(call); });
}

template <class S, class Offset>
void backward_planes(const LrnMaxPoolBackwardCall& call) {
  using A = compute_t<S>;
  const Map &in = call.input, &out = call.pool.grad_input, &grad = call.pool.grad;
  const int64_t height = std::min(in.height, band_rows(in, in.channels, WholeBands<S>::kElements));
  const int64_t bands = (in.height + height - 1) / height;
  parallel_for(in.batch * bands, grain(height * in.width * in.channels),
               [&](int64_t begin, int64_t end) {
                 PlaneUnpool<S, Offset> unpool(call.pool.pool, in.height, in.width);
                 const auto gradient = make_lrn_backward<S, A>(call.lrn, in);
                 Scratch<A> band(in.channels * height * in.width);
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t n = i / bands, first = i % bands * height;
                   const int64_t last = std::min(in.height, first + height);
                   const int64_t pitch = (last - first) * in.width;
                   for (int64_t c = 0; c < in.channels; ++c) {
                     unpool.run(plane_at<const S>(grad, n, c),
                                plane_at<const Offset>(call.pool.offsets, n, c), grad.height,
                                grad.width, first, last, band.data() + c * pitch);
                   }
                   gradient->run(band.data(), pitch, plane_at<const S>(in, n, 0) + first * in.width,
                                 in.channel_stride, plane_at<S>(out, n, 0) + first * in.width,
                                 out.channel_stride, pitch);
                 }
               });
}

}  // namespace

void lrn_max_pool(const LrnMaxPoolCall& call) {
  visit_dtype(call.pool.dtype, [&](auto storage) {
    visit_offsets(call.pool.pool, call.pool.offsets.data != nullptr, [&](auto offset, auto track) {
      using S = decltype(storage);
      using Offset = decltype(offset);
      call.pool.input.channels_last ? forward_pixels<S, Offset, track()>(call)
                                    : forward_planes<S, Offset, track()>(call);
    });
  });
}

void lrn_max_pool_backward(const LrnMaxPoolBackwardCall& call) {
  visit_dtype(call.pool.dtype, [&](auto storage) {
    visit_offsets(call.pool.pool, true, [&](auto offset, auto) {
      using S = decltype(storage);
      using Offset = decltype(offset);
      call.input.channels_last ? backward_pixels<S, Offset>(call)
                               : backward_planes<S, Offset>(call);
    });
  });
}

}  // namespace fastalex::cpu::FASTALEX_ISA

// decode_merge.cuh - from partial results of rows to outputs: within a CTA through shared memory, across CTAs through
// the workspace, where the last CTA to arrive merges. The order of summation is fixed, so results repeat bit for bit.
//
// A partial result ("dump") of a row is, per query column, kDim unnormalised outputs, then the reference (log2) and the
// sum of weights relative to it.
#pragma once

#include "kernels/cuda/decode_memory.h"
#include "kernels/gpu/elements.cuh"
#include "kernels/cuda/schedule.cuh"
#include "kernels/gpu/scores.cuh"

namespace tq::cuda {

// Where the columns of a row go.
struct OutputRow {
  int q_start, head, first_column, columns;
};

TQ_DEVICE OutputRow output_row(const DecodeParams& p, const Cursor& c, int columns) {
  const int first = p.kv_heads.divide(c.row) * columns;
  return {c.q.q_start, p.kv_heads.rest(c.row), first,
          min(columns, c.q.q_len * static_cast<int>(p.group.value) - first)};
}

// What a warp leaves behind besides finished rows. A row is named by its first tile on the line; -1: none.
struct Fragment {
  int first, first_end;  // began in an earlier warp and ended within this one: in the warp's dump 0
  int last, last_end;    // reached the end of the stretch: in the warp's ring
  OutputRow first_row, last_row;
};

// Dumps in the workspace.
template <class C>
TQ_DEVICE float* cta_dump(const DecodeParams& p, int cta, int which) {
  return p.of_ctas + C::traits().cta_dump(cta, which);
}
template <class C>
TQ_DEVICE float* warp_dump(const DecodeParams& p, int warps, int warp, int which) {
  return p.of_warps + C::traits().warp_dump(static_cast<int>(blockIdx.x), warps, warp, which);
}

// A column of several dumps, combined; the lanes share the dimensions.
template <class C>
struct Combined {
  static constexpr int kChunks = (C::kDim + 127) / 128;
  float4 out[kChunks];
  float reference, sum;

  TQ_DEVICE static bool holds(int chunk, int lane) { return 128 * chunk + 4 * lane < C::kDim; }

  // source(i): column i of count, count > 0. kRemote: other CTAs wrote it, so not through this one's L1 cache.
  template <bool kRemote, class Source>
  TQ_DEVICE void gather(int count, int lane, const Source& source) {
    auto load = [](const float* x) { return kRemote ? __ldcg(x) : *x; };
    reference = -INFINITY;
    sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) out[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int base = 0; base < count; base += 32) {
      // Lane i weighs column base + i; the weights go round by shuffles, so that the loads of outputs wait for nothing.
      const bool mine = base + lane < count;
      const float* from = source(min(base + lane, count - 1));
      const float r = mine ? load(from + C::kDim) : -INFINITY;
      const float s = load(from + C::kDim + 1);
      const float before = reference;
      reference = fmaxf(reference, reduce_row<32>(r, [](float a, float b) { return fmaxf(a, b); }));
      const float kept = exp2_approx(before - reference), weight = exp2_approx(r - reference);
      sum = fmaf(sum, kept, reduce_row<32>(mine ? weight * s : 0.0f, [](float a, float b) { return a + b; }));
#pragma unroll
      for (int k = 0; k < kChunks; ++k) out[k].x *= kept, out[k].y *= kept, out[k].z *= kept, out[k].w *= kept;
      const int n = min(32, count - base);
#pragma unroll(kRemote ? 4 : 2)
      for (int i = 0; i < n; ++i) {
        const float f = __shfl_sync(kFullMask, weight, i);
        const float* column = source(base + i);
#pragma unroll
        for (int k = 0; k < kChunks; ++k) {
          if (!holds(k, lane)) continue;
          const auto* at = reinterpret_cast<const float4*>(column + 128 * k + 4 * lane);
          const float4 x = kRemote ? __ldcg(at) : *at;
          out[k].x = fmaf(f, x.x, out[k].x);
          out[k].y = fmaf(f, x.y, out[k].y);
          out[k].z = fmaf(f, x.z, out[k].z);
          out[k].w = fmaf(f, x.w, out[k].w);
        }
      }
    }
  }

  // One column as it was dumped.
  TQ_DEVICE void read(const float* column, int lane) {
    reference = column[C::kDim];
    sum = column[C::kDim + 1];
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      if (holds(k, lane)) out[k] = *reinterpret_cast<const float4*>(column + 128 * k + 4 * lane);
    }
  }

  TQ_DEVICE void write(float* column, int lane) const {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      if (holds(k, lane)) *reinterpret_cast<float4*>(column + 128 * k + 4 * lane) = out[k];
    }
    if (lane == 0) {
      column[C::kDim] = reference;
      column[C::kDim + 1] = sum;
    }
  }

  // Rotates the column back, but for the factor rotation_norm(). What lies beyond dim is anything.
  TQ_DEVICE void rotate(int dim, int lane) {
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const float4 x = out[k];
      const float4 y = make_float4(x.x + x.y, x.x - x.y, x.z + x.w, x.z - x.w);
      out[k] = make_float4(y.x + y.z, y.y + y.w, y.x - y.z, y.y - y.w);
#pragma unroll
      for (int o = 1; o < 32 && 4 * o < C::kDim; o <<= 1) {
        const bool takes = rotates_over(128 * k + 4 * lane, 4 * o, dim), upper = (lane & o) != 0;
        auto exchange = [=](float& mine) {
          const float other = __shfl_xor_sync(kFullMask, mine, o);
          if (takes) mine = upper ? other - mine : mine + other;
        };
        exchange(out[k].x), exchange(out[k].y), exchange(out[k].z), exchange(out[k].w);
      }
    }
#pragma unroll
    for (int o = 1; o < kChunks; o <<= 1) {
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        if ((k & o) != 0 || !rotates_over(128 * k, 128 * o, dim)) continue;
        const float4 x = out[k], y = out[k + o];
        out[k] = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
        out[k + o] = make_float4(x.x - y.x, x.y - y.y, x.z - y.z, x.w - y.w);
      }
    }
  }

  TQ_DEVICE void finish(const DecodeParams& p, const OutputRow& row, int n, int lane) {
    const AttendParams& a = p.attend;
    const int column = row.first_column + n;
    const int64_t token = row.q_start + p.group.divide(column);
    const int head = row.head * static_cast<int>(p.group.value) + p.group.rest(column);
    const float f = a.sinks != nullptr ? add_sink(a.sinks[head], reference, sum) : 1.0f;
    const float normaliser = sum == 0.0f ? 0.0f : __fdividef(f, sum);
    const int dim = C::kExact ? C::kDim : a.cache.layout.head_dim_v;
    if constexpr (C::F::kRotatesValues) rotate(dim, lane);
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const int d = 128 * k + 4 * lane;
      if (d >= dim) continue;
      const float scale = C::F::kRotatesValues ? normaliser * rotation_norm(d, dim) : normaliser;
      const float4 x = make_float4(out[k].x * scale, out[k].y * scale, out[k].z * scale, out[k].w * scale);
      store_4(a.dtype, a.out, token * a.out_token_stride + head * a.out_head_stride + d, x, p.vector_out);
    }
    if (a.lse != nullptr && lane == 0) {
      a.lse[token * a.num_heads + head] = natural_lse(reference, sum, log2_approx(sum));
    }
  }
};

// A row that crosses the CTA's borders; no owners: none.
struct OpenRow {
  Owners owners;
  OutputRow row;
};

// In shared memory; of the row that began in an earlier CTA, and of the one that goes on in the next.
struct MergeShared {
  OpenRow open[2];
  bool arrived_last[2];
};

// Merges one row's partial results of all CTAs; by the whole CTA, whose shared memory is free.
template <class C>
TQ_DEVICE void merge_row(const DecodeParams& p, const OpenRow& open, uint8_t* smem, int warp, int warps, int lane) {
  const int owner = open.owners.first, count = open.owners.count;
  auto source = [&](int c, int n) { return cta_dump<C>(p, owner + c, c == 0 ? 1 : 0) + n * C::kDumpPitch; };
  const int parts = max(1, min(warps / open.row.columns, (count + 3) / 4));
  // Several warps may share a column: part k takes contributors k, k + parts, ...
  auto* stage = reinterpret_cast<float*>(smem);
  if (parts > 1 && warp < parts * open.row.columns) {
    const int n = warp / parts, k = warp % parts;
    Combined<C> c;
    c.template gather<true>((count - k + parts - 1) / parts, lane, [&](int i) { return source(k + i * parts, n); });
    c.write(stage + warp * C::kDumpPitch, lane);
  }
  __syncthreads();
  for (int n = warp; n < open.row.columns; n += warps) {
    Combined<C> c;
    if (parts > 1) {
      c.template gather<false>(parts, lane, [&](int i) { return stage + (n * parts + i) * C::kDumpPitch; });
    } else {
      c.template gather<true>(count, lane, [&](int i) { return source(i, n); });
    }
    c.finish(p, open.row, n, lane);
  }
  __syncthreads();
}

template <class C>
TQ_DEVICE void merge_cta(const DecodeParams& p, const Fragment* fragments, MergeShared& shared, uint8_t* smem,
                         int ring_bytes, const Stretches& stretches, int cta_begin, int cta_end, int warp, int warps,
                         int lane) {
  OpenRow(&open)[2] = shared.open;
  if (threadIdx.x < 2) open[threadIdx.x].owners.count = 0;
  __syncthreads();
  // Groups of warps that hold parts of one row: first the row that began in an earlier CTA and ended in warp 0, then
  // those that were under way at the end of a warp's stretch. Their columns are dealt out to the warps in turn.
  const int last = lane < warps ? fragments[lane].last : -1, first = lane < warps ? fragments[lane].first : -1;
  const int before = __shfl_up_sync(kFullMask, last, 1);
  unsigned leaders = __ballot_sync(kFullMask, last >= 0 && (lane == 0 || before != last));
  bool leading_tail = fragments[0].first >= 0;
  int task = 0;
  while (leading_tail || leaders != 0) {
    const int g = leading_tail ? 0 : __ffs(leaders) - 1;
    const Fragment& of = fragments[g];
    const int begin = leading_tail ? of.first : of.last, end = leading_tail ? of.first_end : of.last_end;
    const OutputRow row = leading_tail ? of.first_row : of.last_row;
    const int members = __popc(__ballot_sync(kFullMask, last == begin));
    const unsigned tail = __ballot_sync(kFullMask, first == begin);  // the warp in which the row ended
    const float* tail_dump = warp_dump<C>(p, warps, tail != 0 ? __ffs(tail) - 1 : 0, 0);
    const bool complete = begin >= cta_begin && end <= cta_end;
    const int slot = begin < cta_begin ? 0 : 1;
    int n = warp - task % warps;
    for (n = n < 0 ? n + warps : n; n < row.columns; n += warps) {
      auto source = [&](int i) {
        const float* dump = i < members ? reinterpret_cast<const float*>(smem + (g + i) * ring_bytes) : tail_dump;
        return dump + n * C::kDumpPitch;
      };
      Combined<C> c;
      c.template gather<false>(members + (tail != 0 ? 1 : 0), lane, source);
      if (complete) {
        c.finish(p, row, n, lane);
      } else {
        c.write(cta_dump<C>(p, static_cast<int>(blockIdx.x), slot) + n * C::kDumpPitch, lane);
      }
    }
    task += row.columns;
    if (!complete && threadIdx.x == 0) open[slot] = {stretches.owners(static_cast<int>(blockIdx.x), begin, end), row};
    if (leading_tail) {
      leading_tail = false;
    } else {
      leaders &= leaders - 1;
    }
  }
  __syncthreads();
  if (open[0].owners.count == 0 && open[1].owners.count == 0) return;
  // One thread for each open row releases what the whole CTA wrote, the barrier above being before it, and acquires
  // what the others released. (A fence of every thread costs a microsecond and a half.)
  if (threadIdx.x < 2) {
    const Owners owners = open[threadIdx.x].owners;
    bool last = false;
    // A CTA has at most one row that begins in it and goes on: its counter is that row's. The last to arrive leaves it
    // at zero, for the next launch.
    if (owners.count > 0) last = arrive(p.counters + owners.first, owners.count);
    shared.arrived_last[threadIdx.x] = last;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (shared.arrived_last[k]) merge_row<C>(p, open[k], smem, warp, warps, lane);
  }
}

}  // namespace tq::cuda

// decode_warp.cuh - what one warp does with its tiles: scores, masks, running softmax and output of one row.
#pragma once

#include "kernels/cuda/decode_query.cuh"
#include "kernels/cuda/value_tile.cuh"

namespace tq::cuda {

// Running state of a warp over one row: maxima, sums, outputs of a lane's two columns of each column tile.
template <class C>
struct Running {
  float o[C::NT][C::kDim / 16][4];
  float sum[C::NT][2], zero[C::NT][2];
  float minus_ref[C::NT][2];  // weights are exp2(score + minus_ref)

  TQ_DEVICE void clear() {
#pragma unroll
    for (int nt = 0; nt < C::NT; ++nt) {
#pragma unroll
      for (int i = 0; i < C::kDim / 16; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) o[nt][i][j] = 0.0f;
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        sum[nt][e] = zero[nt][e] = 0.0f;
        minus_ref[nt][e] = 1e25f;  // above any score: the first tile sets it
      }
    }
  }
};

// What a lane knows of its columns.
template <int NT>
struct Columns {
  int position[NT][2];
  float slope[NT][2];
};

template <class C>
struct DecodeWarp {
  using F = typename C::F;
  using Key = KeyTile<F, C::kDim, C::kExact>;
  using Value = ValueTile<F, C::kDim, C::kExact>;
  using Shape = AtomShape<F, C::kDim, C::kExact>;
  static constexpr int NT = C::NT;
  static constexpr int kQueryRegisters = C::kQueryInRegisters ? NT * Key::kPlanes * Key::kSteps : 1;

  const DecodeParams& p;
  const Shape shape;
  const int lane, r, t;
  QueryArea<C> area;  // of the row
  uint2 query[kQueryRegisters];
  QueryScale<NT> scale;
  Columns<NT> columns;
  Running<C> run;
  int full_begin, full_end;  // tokens that every column sees as they are

  // Where this lane reads in an atom.
  const uint32_t key_lower, key_upper, value_first, value_third, halves;
  const uint32_t swap;  // selector that puts a pair of halves into the order of this lane's tokens

  TQ_DEVICE DecodeWarp(const DecodeParams& params, int lane_)
      : p(params),
        shape(params.attend.cache.layout),
        lane(lane_),
        r(lane_ >> 2),
        t(lane_ & 3),
        key_lower(opaque(Key::offset(shape, r, t, false))),
        key_upper(opaque(Key::offset(shape, r, t, true))),
        value_first(opaque(Value::offset(shape, r, t, false))),
        value_third(opaque(Value::offset(shape, r, t, true))),
        halves(opaque(4 * r)),
        swap(opaque(token_parity(r) ? 0x1032 : 0x3210)) {}

  // Takes this lane's fragments of a prepared row.
  TQ_DEVICE void start_row(const Cursor& c, const QueryArea<C>& prepared) {
    const AttendParams& a = p.attend;
    const int group = static_cast<int>(p.group.value);
    const int head = p.kv_heads.rest(c.row), first_column = p.kv_heads.divide(c.row) * C::kColumns;
    const int num_columns = c.q.q_len * group;
    area = prepared;
    full_begin = 0;
    full_end = c.q.len;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      if constexpr (C::kQueryInRegisters) {
#pragma unroll
        for (int i = 0; i < Key::kPlanes * Key::kSteps; ++i) {
          query[nt * Key::kPlanes * Key::kSteps + i] = query_words(nt, i / Key::kSteps, i % Key::kSteps);
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int n = nt * 8 + 2 * t + e;
        scale.unit[nt][e] = area.unit(n);
        scale.bias[nt][e] = area.bias(n);
        const int column = min(first_column + n, num_columns - 1);
        columns.position[nt][e] = c.q.len - c.q.q_len + p.group.divide(column);
        columns.slope[nt][e] = a.alibi_slopes != nullptr ? a.alibi_slopes[head * group + p.group.rest(column)] : 0.0f;
      }
    }
    // Bounds of the tokens that need no mask; the first and last valid columns have the extreme positions.
    const int low = c.q.len - c.q.q_len + p.group.divide(first_column);
    const int high = c.q.len - c.q.q_len + p.group.divide(min(first_column + C::kColumns - 1, num_columns - 1));
    if (a.causal) full_end = min(full_end, low + 1);
    if (a.sliding_window > 0) full_begin = max(0, high - a.sliding_window + 1);
    if (a.soft_cap > 0.0f || a.alibi_slopes != nullptr) full_end = 0;
    run.clear();
  }

  // Keys and values of as many bits have one book, whose registers they share.
  TQ_DEVICE const DeviceBook& value_book() const { return F::kKeyBits == F::kValueBits ? p.key_book : p.value_book; }

  TQ_DEVICE uint2 query_words(int nt, int plane, int step) const {
    return Key::query_words(area.row(nt * 8 + r), plane, step, t);
  }

  // Masks, soft cap and ALiBi, for the tiles and layers that need them. s stays in units of scale.unit.
  TQ_DEVICE void modify(const Cursor& c, int token0, float (&s)[C::kAtoms][NT][4], uint32_t (&scales)[C::kAtoms],
                        uint32_t (&zeros)[C::kAtoms]) {
    const AttendParams& a = p.attend;
    const int window = a.sliding_window > 0 ? a.sliding_window : 1 << 30;
    uint32_t seen = 0;  // bit 4 * (i * NT + nt) + j of s[i][nt][j]
    auto token_of = [&](int i, int h) { return token0 + 16 * i + token_row(r, h == 1); };
#pragma unroll
    for (int i = 0; i < C::kAtoms; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int token = token_of(i, h);
        if (token >= c.q.len) {  // whatever bytes are there may be NaN
          scales[i] &= h == 0 ? 0xFFFF0000u : 0x0000FFFFu;
          zeros[i] &= h == 0 ? 0xFFFF0000u : 0x0000FFFFu;
        }
#pragma unroll
        for (int n = 0; n < 2 * NT; ++n) {
          const int position = columns.position[n >> 1][n & 1];
          const int end = a.causal ? min(c.q.len, position + 1) : c.q.len;
          if (token < end && token > position - window) seen |= 1u << (4 * (i * NT + (n >> 1)) + 2 * h + (n & 1));
        }
      }
    }
    if (a.spans != nullptr) {
      const int32_t* spans = a.spans + int64_t{c.seq} * a.max_spans * 2;
#pragma unroll 1
      for (int k = 0; k < a.max_spans; ++k) {
        const int first = spans[2 * k], end = min(spans[2 * k + 1], c.q.len);
#pragma unroll
        for (int n = 0; n < 2 * NT; ++n) {
          const int position = columns.position[n >> 1][n & 1];
          if (position < first || position >= end) continue;
#pragma unroll
          for (int i = 0; i < 2 * C::kAtoms; ++i) {
            const int token = token_of(i >> 1, i & 1);
            if (token >= first && token < end) seen |= 1u << (4 * ((i >> 1) * NT + (n >> 1)) + 2 * (i & 1) + (n & 1));
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 2 * NT; ++n) {
      const float unit = scale.unit[n >> 1][n & 1], inverse = __fdividef(1.0f, unit);
#pragma unroll
      for (int i = 0; i < 2 * C::kAtoms; ++i) {
        float& x = s[i >> 1][n >> 1][2 * (i & 1) + (n & 1)];
        if (a.soft_cap > 0.0f || a.alibi_slopes != nullptr) {
          const int distance = token_of(i >> 1, i & 1) - columns.position[n >> 1][n & 1];
          x = modify_score(x * unit, a.soft_cap, columns.slope[n >> 1][n & 1], distance) * inverse;
        }
        if ((seen >> (4 * ((i >> 1) * NT + (n >> 1)) + 2 * (i & 1) + (n & 1)) & 1u) == 0) x = kMasked;
      }
    }
  }

  // atoms: address in shared memory.
  TQ_DEVICE void tile(const Cursor& c, uint32_t atoms) {
    float s[C::kAtoms][NT][4];
    uint32_t scales[C::kAtoms], zeros[C::kAtoms];
    const uint8_t* lower = shared_pointer(atoms + key_lower);
    const uint8_t* upper = shared_pointer(atoms + key_upper);
    const uint8_t* of_tokens = shared_pointer(atoms + halves);
#pragma unroll
    for (int i = 0; i < C::kAtoms; ++i) {
      const int at = i * shape.atom_bytes();
      Key::template scores<NT>(
          shape, p.key_book, lower + at, upper + at, of_tokens + at + shape.norm_offset(), swap, t, scale,
          [this](int nt, int plane, int step) {
            if constexpr (C::kQueryInRegisters) {
              return query[(nt * Key::kPlanes + plane) * Key::kSteps + step];
            } else {
              return query_words(nt, plane, step);
            }
          },
          s[i]);
      scales[i] = *reinterpret_cast<const uint32_t*>(of_tokens + at + shape.scale_offset());
      zeros[i] = F::kRotatesValues ? 0u : *reinterpret_cast<const uint32_t*>(of_tokens + at + shape.zero_offset());
      scales[i] = byte_permute(scales[i], scales[i], swap);
      zeros[i] = byte_permute(zeros[i], zeros[i], swap);
    }
    const int token0 = c.q.first + c.tile * C::kTileTokens;
    if (token0 < full_begin || token0 + C::kTileTokens > full_end) modify(c, token0, s, scales, zeros);

    // Weights p = exp2(score - ref) enter the sum; w = p * scale goes into the matrix unit as fp16 and must fit, so w
    // decides when ref moves. A scale of 0 counts as the smallest that fp16 has: then p stays bounded too.
    float weight[C::kAtoms][NT][4], scaled[C::kAtoms][NT][4];
    float2 scale_of[C::kAtoms];
#pragma unroll
    for (int i = 0; i < C::kAtoms; ++i) scale_of[i] = unpack_half2(scales[i]);
    auto weigh = [&] {  // returns the largest that the matrix unit will get
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < C::kAtoms; ++i) {
        float top[2] = {0.0f, 0.0f};  // of the weights of this lane's two tokens
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float w = exp2_approx(fmaf(s[i][nt][j], scale.unit[nt][j & 1], run.minus_ref[nt][j & 1]));
            weight[i][nt][j] = w;
            scaled[i][nt][j] = w * (j < 2 ? scale_of[i].x : scale_of[i].y);
            top[j / 2] = fmaxf(top[j / 2], w);
          }
        }
        largest = fmaxf(largest, top[0] * fmaxf(scale_of[i].x, 6e-8f));
        largest = fmaxf(largest, top[1] * fmaxf(scale_of[i].y, 6e-8f));
      }
      return largest;
    };
    if (__any_sync(kFullMask, weigh() > 16384.0f)) {
      raise_reference(s, scale_of);
      weigh();
    }
    const uint8_t* first = shared_pointer(atoms + value_first);
    const uint8_t* third = shared_pointer(atoms + value_third);
#pragma unroll
    for (int i = 0; i < C::kAtoms; ++i) {
      const float2 zero = unpack_half2(zeros[i]);
      uint32_t fragment[NT][2];
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const float (&w)[4] = weight[i][nt];
        const float (&v)[4] = scaled[i][nt];
        run.sum[nt][0] += w[0] + w[2];
        run.sum[nt][1] += w[1] + w[3];
        const uint32_t lower = pack_half2(v[0], v[1]), upper = pack_half2(v[2], v[3]);
        if constexpr (F::kRotatesValues) {
          // In units of the levels' offset, and of the weights as they were rounded: 64 levels are more than one.
          const float2 x = unpack_half2(lower), y = unpack_half2(upper);
          run.zero[nt][0] += x.x + y.x;
          run.zero[nt][1] += x.y + y.y;
        } else {
          run.zero[nt][0] = fmaf(w[0], zero.x, fmaf(w[2], zero.y, run.zero[nt][0]));
          run.zero[nt][1] = fmaf(w[1], zero.x, fmaf(w[3], zero.y, run.zero[nt][1]));
        }
        fragment[nt][0] = transpose_8x8(lower);
        fragment[nt][1] = transpose_8x8(upper);
      }
      const int at = i * shape.atom_bytes() + shape.value_offset();
      Value::template accumulate<NT>(shape, value_book(), first + at, third + at, r, fragment, run.o);
    }
  }

  TQ_DEVICE void raise_reference(const float (&s)[C::kAtoms][NT][4], const float2 (&scale_of)[C::kAtoms]) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float top = kMasked;
#pragma unroll
        for (int i = 0; i < C::kAtoms; ++i) {
          top = fmaxf(top, fmaf(s[i][nt][e], scale.unit[nt][e], log2_approx(fmaxf(scale_of[i].x, 6e-8f))));
          top = fmaxf(top, fmaf(s[i][nt][2 + e], scale.unit[nt][e], log2_approx(fmaxf(scale_of[i].y, 6e-8f))));
        }
#pragma unroll
        for (int o = 4; o < 32; o <<= 1) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, o));
        const float now = fminf(run.minus_ref[nt][e], 4.0f - top);
        const float f = exp2_approx(now - run.minus_ref[nt][e]);
        run.minus_ref[nt][e] = now;
        run.sum[nt][e] *= f;
        run.zero[nt][e] *= f;
#pragma unroll
        for (int i = 0; i < C::kDim / 16; ++i) {
          run.o[nt][i][e] *= f;
          run.o[nt][i][2 + e] *= f;
        }
      }
    }
  }

  // Adds the zero points to the outputs. Codes are not negative, so without them the accumulators only grow, and each
  // sum in the matrix unit, which truncates, loses up to 2^-23 of them: over 20,000 tokens of nearly equal weight 1e-4
  // of something a hundred times as large as the output. Now and then, they are small again. Rotated values need that
  // sooner: all dimensions lose about as much, and rotating back adds that up in the first one.
  TQ_DEVICE void fold_zeros() {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float zero = run.zero[nt][e];
#pragma unroll
        for (int o = 4; o < 32; o <<= 1) zero += __shfl_xor_sync(kFullMask, zero, o);
        run.zero[nt][e] = 0.0f;
        if constexpr (F::kRotatesValues) zero *= -1.0f * kLevelOffset;
#pragma unroll
        for (int i = 0; i < C::kDim / 16; ++i) {
          run.o[nt][i][e] = fmaf(zero, 1.0f / kCodeUnits, run.o[nt][i][e]);
          run.o[nt][i][2 + e] = fmaf(zero, Value::kOddUnits / kCodeUnits, run.o[nt][i][2 + e]);
        }
      }
    }
  }

  // Writes the state as plain floats, rotated values still so: column n has its unnormalised output, then reference and
  // sum at kDim, kDim + 1.
  TQ_DEVICE void dump(float* to) {
    fold_zeros();
    float unit = kCodeUnits;
    if constexpr (F::kRotatesValues) unit *= value_book().unit * rsqrtf(static_cast<float>(shape.head_dim_v()));
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = run.sum[nt][e];
#pragma unroll
        for (int o = 4; o < 32; o <<= 1) sum += __shfl_xor_sync(kFullMask, sum, o);
        float* column = to + (nt * 8 + 2 * t + e) * C::kDumpPitch;
#pragma unroll
        for (int i = 0; i < C::kDim / 16; ++i) {
          const int2 d = Value::dims(i, r);
          column[d.x] = run.o[nt][i][e] * unit;
          column[d.y] = run.o[nt][i][2 + e] * (unit / Value::kOddUnits);
        }
        if (r == 0) {
          column[C::kDim] = -run.minus_ref[nt][e];
          column[C::kDim + 1] = sum;
        }
      }
    }
  }
};

}  // namespace tq::cuda

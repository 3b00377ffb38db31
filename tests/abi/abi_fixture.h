// abi_fixture.h - a small valid store and attend call, which tests then spoil one field at a time.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "tq_backend.h"

namespace tq::testing {

inline const TqApi& api() {
  static const TqApi* table = tq_get_api(TQ_ABI_MAJOR, nullptr);
  return *table;
}

inline TqError make_error() {
  TqError error = {};
  error.struct_size = sizeof(error);
  return error;
}

inline int32_t fake_quantize(uint32_t format_id, TqSide side, int32_t head_dim, int64_t num_rows, const float* in,
                             float* out, TqError* error = nullptr) {
  TqFakeQuantizeArgs args = {};
  args.struct_size = sizeof(args);
  args.format_id = format_id;
  args.side = side;
  args.head_dim = head_dim;
  args.num_rows = num_rows;
  args.in = in;
  args.out = out;
  return api().fake_quantize(&args, error);
}

class AbiTest : public ::testing::Test {
 protected:
  static constexpr int kHeads = 4, kKvHeads = 2, kDim = 64, kBlock = 32, kBlocks = 6, kTokens = 40;

  void SetUp() override {
    TqBackendOptions options = {};
    options.struct_size = sizeof(options);
    options.device_kind = TQ_DEVICE_CPU;
    TqError error = make_error();
    ASSERT_EQ(api().create_backend(&options, &backend, &error), TQ_OK) << error.message;

    layer = {};
    layer.struct_size = sizeof(layer);
    layer.format_id = TQ_FORMAT_TURBOQUANT_4BIT_NC;
    layer.num_heads = kHeads;
    layer.num_kv_heads = kKvHeads;
    layer.head_dim = kDim;
    layer.dtype = TQ_DTYPE_F32;
    layer.attention_kind = TQ_ATTENTION_DECODER;

    page_bytes = int64_t{70} * kKvHeads * kBlock;
    storage.resize(static_cast<size_t>(page_bytes * kBlocks + 64));
    pages = {};
    pages.struct_size = sizeof(pages);
    pages.format_id = layer.format_id;
    pages.data = aligned(storage);
    pages.num_blocks = kBlocks;
    pages.block_stride_bytes = page_bytes;
    pages.block_size = kBlock;

    key.resize(kTokens * kKvHeads * kDim);
    for (size_t i = 0; i < key.size(); ++i) key[i] = std::sin(static_cast<float>(i) * 0.7f) + 0.1f;
    value = key;
    for (int i = 0; i < kTokens; ++i) slots.push_back(i);
    store = {};
    store.struct_size = sizeof(store);
    store.layer = &layer;
    store.pages = &pages;
    store.num_tokens = kTokens;
    store.key = key.data();
    store.key_token_stride = kKvHeads * kDim;
    store.key_head_stride = kDim;
    store.value = value.data();
    store.value_token_stride = kKvHeads * kDim;
    store.value_head_stride = kDim;
    store.slot_mapping = slots.data();

    query.resize(3 * kHeads * kDim, 0.25f);
    out.resize(query.size(), -7.0f);
    uint64_t bytes = 0;
    ASSERT_EQ(api().workspace_size(backend, &layer, &bytes, &error), TQ_OK) << error.message;
    scratch.resize(bytes + 64);
    attend = {};
    attend.struct_size = sizeof(attend);
    attend.num_seqs = 2;
    attend.layer = &layer;
    attend.pages = &pages;
    attend.num_tokens = 3;
    attend.query = query.data();
    attend.query_token_stride = kHeads * kDim;
    attend.query_head_stride = kDim;
    attend.out = out.data();
    attend.out_token_stride = kHeads * kDim;
    attend.out_head_stride = kDim;
    attend.query_start_loc = starts;
    attend.seq_lens = lens;
    attend.block_table = table;
    attend.block_table_stride = 2;
    attend.max_blocks_per_seq = 2;
    attend.scale = 0.125f;
    attend.causal = 1;
    attend.workspace = aligned(scratch);
    attend.workspace_bytes = bytes;
  }

  void TearDown() override { api().destroy_backend(backend); }

  static uint8_t* aligned(std::vector<uint8_t>& bytes) {
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(bytes.data()) + 63) / 64 * 64);
  }

  TqBackend* backend = nullptr;
  TqLayerDesc layer;
  TqPages pages;
  TqStoreKvArgs store;
  TqAttendArgs attend;
  int64_t page_bytes = 0;
  std::vector<uint8_t> storage, scratch;
  std::vector<float> key, value, query, out;
  std::vector<int64_t> slots;
  int32_t starts[3] = {0, 1, 3};
  int32_t lens[2] = {40, 7};
  int32_t table[4] = {0, 1, 2, 3};
};

}  // namespace tq::testing

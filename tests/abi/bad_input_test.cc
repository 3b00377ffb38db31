// bad_input_test.cc - each wrong argument gives a code and one sentence that names it, and nothing is written.
#include <functional>
#include <limits>

#include "abi_fixture.h"

namespace tq::testing {
namespace {

class BadInput : public AbiTest {
 protected:
  // Spoils the valid calls, expects the code and words, and that a spoilt attend left its output alone.
  void expect_attend(const std::string& words, const std::function<void()>& spoil, int code = TQ_INVALID_ARGUMENT) {
    SetUpAgain();
    spoil();
    TqError error = make_error();
    EXPECT_EQ(api().attend(backend, &attend, &error), code) << words;
    EXPECT_NE(std::string(error.message).find(words), std::string::npos) << error.message;
    EXPECT_EQ(error.code, code);
    for (const float x : out) ASSERT_EQ(x, -7.0f) << words;
  }

  void expect_store(const std::string& words, const std::function<void()>& spoil, int code = TQ_INVALID_ARGUMENT) {
    SetUpAgain();
    spoil();
    TqError error = make_error();
    EXPECT_EQ(api().store_kv(backend, &store, &error), code) << words;
    EXPECT_NE(std::string(error.message).find(words), std::string::npos) << error.message;
    for (const uint8_t x : storage) ASSERT_EQ(x, 0) << words;
  }

  void SetUpAgain() {
    api().destroy_backend(backend);
    storage.clear();
    slots.clear();
    out.clear();
    const int32_t fresh_starts[] = {0, 1, 3}, fresh_lens[] = {40, 7}, fresh_table[] = {0, 1, 2, 3};
    std::memcpy(starts, fresh_starts, sizeof(starts));
    std::memcpy(lens, fresh_lens, sizeof(lens));
    std::memcpy(table, fresh_table, sizeof(table));
    SetUp();
  }
};

TEST_F(BadInput, Layer) {
  expect_attend("layer is NULL", [&] { attend.layer = nullptr; });
  expect_attend("layer.struct_size is 4", [&] { layer.struct_size = 4; });
  expect_attend("format_id is 77", [&] { layer.format_id = 77; });
  expect_attend("layer.head_dim is 24", [&] { layer.head_dim = 24; });
  expect_attend("layer.head_dim is 0", [&] { layer.head_dim = 0; });
  expect_attend("layer.head_dim is 528", [&] { layer.head_dim = 528; });
  expect_attend("layer.head_dim_v is -16", [&] { layer.head_dim_v = -16; });
  expect_attend("layer.num_heads is 3", [&] { layer.num_heads = 3; });
  expect_attend("layer.num_kv_heads is 0", [&] { layer.num_kv_heads = 0; });
  expect_attend("layer.dtype is 9", [&] { layer.dtype = 9; });
  expect_attend("layer.sliding_window is -1", [&] { layer.sliding_window = -1; });
  expect_attend("layer.soft_cap", [&] { layer.soft_cap = std::numeric_limits<float>::quiet_NaN(); });
  expect_attend("layer.soft_cap", [&] { layer.soft_cap = -1; });
  expect_attend("layer.attention_kind is 0", [&] { layer.attention_kind = 0; });
  expect_attend("fp8 cache", [&] { layer.attention_kind = TQ_ATTENTION_MLA; }, TQ_UNIMPLEMENTED);
  expect_attend("engine's own backend", [&] { layer.attention_kind = TQ_ATTENTION_CROSS; }, TQ_UNIMPLEMENTED);
  expect_attend("engine's own backend", [&] { layer.attention_kind = TQ_ATTENTION_ENCODER; }, TQ_UNIMPLEMENTED);
}

TEST_F(BadInput, Pages) {
  expect_store("pages is NULL", [&] { store.pages = nullptr; });
  expect_store("pages.data is NULL", [&] { pages.data = nullptr; });
  expect_store("pages.data is not aligned", [&] { pages.data = static_cast<uint8_t*>(pages.data) + 8; });
  expect_store("layer's format, turboquant_4bit_nc", [&] { pages.format_id = TQ_FORMAT_TURBOQUANT_K8V4; });
  expect_store("pages.block_size is 20", [&] { pages.block_size = 20; });
  expect_store("pages.block_size is 0", [&] { pages.block_size = 0; });
  expect_store("pages.num_blocks is 0", [&] { pages.num_blocks = 0; });
  expect_store("pages.num_blocks is", [&] { pages.num_blocks = std::numeric_limits<int64_t>::max(); });
  expect_store("pages.block_stride_bytes", [&] { pages.block_stride_bytes = page_bytes - 16; });
  expect_store("pages.block_stride_bytes", [&] { pages.block_stride_bytes = page_bytes + 8; });
}

TEST_F(BadInput, Store) {
  expect_store("args.struct_size is 8", [&] { store.struct_size = 8; });
  expect_store("num_tokens is -1", [&] { store.num_tokens = -1; });
  expect_store("stream is not NULL", [&] { store.stream = this; });
  expect_store("key is NULL", [&] { store.key = nullptr; });
  expect_store("value is NULL", [&] { store.value = nullptr; });
  expect_store("slot_mapping is NULL", [&] { store.slot_mapping = nullptr; });
  const float offset[512] = {};
  expect_store("key_offset is set and the layer's soft_cap is 30", [&] {
    store.key_offset = offset;
    layer.soft_cap = 30;
  });
  expect_store("slot_mapping[3] is -2", [&] { slots[3] = -2; });
  expect_store("slot_mapping[5] is 192", [&] { slots[5] = int64_t{kBlocks} * kBlock; });
  expect_store("key_head_stride is 32", [&] { store.key_head_stride = 32; });
  expect_store("value_token_stride is 0", [&] { store.value_token_stride = 0; });
}

TEST_F(BadInput, Attend) {
  expect_attend("num_seqs is -1", [&] { attend.num_seqs = -1; });
  expect_attend("num_tokens is -1", [&] { attend.num_tokens = -1; });
  expect_attend("stream is not NULL", [&] { attend.stream = this; });
  expect_attend("query is NULL", [&] { attend.query = nullptr; });
  expect_attend("out is NULL", [&] { attend.out = nullptr; });
  expect_attend("query_start_loc is NULL", [&] { attend.query_start_loc = nullptr; });
  expect_attend("seq_lens is NULL", [&] { attend.seq_lens = nullptr; });
  expect_attend("block_table is NULL", [&] { attend.block_table = nullptr; });
  expect_attend("query_start_loc[0] is 1", [&] { starts[0] = 1; });
  expect_attend("query_start_loc[2] is 0", [&] { starts[2] = 0; });
  expect_attend("it must be at most num_tokens, 3", [&] { starts[2] = 4; });
  expect_attend("seq_lens[1] is 1", [&] { lens[1] = 1; });
  expect_attend("its block table holds 64 tokens", [&] { lens[0] = 65; });
  expect_attend("holds block 6 at entry 1", [&] { table[1] = kBlocks; });
  expect_attend("holds block -1 at entry 0", [&] { table[2] = -1; });
  expect_attend("block_table_stride is 1", [&] { attend.block_table_stride = 1; });
  expect_attend("scale is", [&] { attend.scale = std::numeric_limits<float>::infinity(); });
  expect_attend("causal is 2", [&] { attend.causal = 2; });
  expect_attend("workspace_bytes is 100", [&] { attend.workspace_bytes = 100; });
  expect_attend("workspace is not aligned", [&] { attend.workspace = static_cast<uint8_t*>(attend.workspace) + 4; });
  expect_attend("workspace is NULL", [&] { attend.workspace = nullptr; });
  expect_attend("query_head_stride is 3", [&] { attend.query_head_stride = 3; });
}

TEST_F(BadInput, DequantAndRotate) {
  int32_t first[] = {0, 3}, rows[] = {0, 64, 70}, counts[] = {64, 5};
  TqDequantKvArgs dequant = {};
  dequant.struct_size = sizeof(dequant);
  dequant.layer = &layer;
  dequant.pages = &pages;
  dequant.num_seqs = 2;
  dequant.max_blocks_per_seq = 2;
  dequant.block_table = table;
  dequant.block_table_stride = 2;
  dequant.first_tokens = first;
  dequant.token_start_loc = rows;
  dequant.token_counts = counts;
  dequant.num_tokens = 70;
  TqError error = make_error();
  EXPECT_EQ(api().dequant_kv(backend, &dequant, &error), TQ_OK) << error.message;
  auto expect_dequant = [&](const char* words, auto&& spoil) {
    const TqDequantKvArgs args = dequant;
    const std::vector<int32_t> tables[] = {
        {first, first + 2}, {rows, rows + 3}, {counts, counts + 2}, {table, table + 4}};
    spoil();
    TqError said = make_error();
    EXPECT_EQ(api().dequant_kv(backend, &dequant, &said), TQ_INVALID_ARGUMENT) << words;
    EXPECT_NE(std::string(said.message).find(words), std::string::npos) << said.message;
    dequant = args;
    std::copy(tables[0].begin(), tables[0].end(), first);
    std::copy(tables[1].begin(), tables[1].end(), rows);
    std::copy(tables[2].begin(), tables[2].end(), counts);
    std::copy(tables[3].begin(), tables[3].end(), table);
  };
  expect_dequant("num_seqs is -1", [&] { dequant.num_seqs = -1; });
  expect_dequant("stream is not NULL", [&] { dequant.stream = &error; });
  expect_dequant("num_tokens is -1", [&] { dequant.num_tokens = -1; });
  expect_dequant("max_blocks_per_seq is -1", [&] { dequant.max_blocks_per_seq = -1; });
  expect_dequant("block_table_stride is 1", [&] { dequant.block_table_stride = 1; });
  expect_dequant("keep_rotated is 2", [&] { dequant.keep_rotated = 2; });
  expect_dequant("first_tokens is NULL", [&] { dequant.first_tokens = nullptr; });
  expect_dequant("token_start_loc is NULL", [&] { dequant.token_start_loc = nullptr; });
  expect_dequant("block_table is NULL", [&] { dequant.block_table = nullptr; });
  expect_dequant("token_start_loc[0] is 1; it must be 0", [&] { rows[0] = 1; });
  expect_dequant("token_start_loc[2] is 63, below the 64 before it", [&] { rows[2] = 63; });
  expect_dequant("token_start_loc[2] is 71; it must be at most num_tokens, 70", [&] { rows[2] = 71; });
  expect_dequant("token_counts[1] is 7; it must be from 0 to the sequence's 6 rows", [&] { counts[1] = 7; });
  expect_dequant("token_counts[0] is -1", [&] { counts[0] = -1; });
  expect_dequant("first_tokens[1] is -3; it must not be negative", [&] { first[1] = -3; });
  expect_dequant("first_tokens[0] is 1 with 64 tokens to decode; its block table holds 64 tokens",
                 [&] { first[0] = 1; });
  expect_dequant("first_tokens[1] is 2147483647", [&] { first[1] = std::numeric_limits<int32_t>::max(); });
  expect_dequant("holds block 6 at entry 1", [&] { table[1] = kBlocks; });
  table[3] = -1;  // beyond what the second sequence's range reads
  EXPECT_EQ(api().dequant_kv(backend, &dequant, &error), TQ_OK) << error.message;
  table[3] = 3;

  TqRotateArgs rotate = {};
  rotate.struct_size = sizeof(rotate);
  rotate.num_heads = kHeads;
  rotate.side = TQ_SIDE_QUERY;
  rotate.layer = &layer;
  rotate.num_tokens = 3;
  rotate.x = query.data();
  rotate.x_token_stride = rotate.out_token_stride = kHeads * kDim;
  rotate.x_head_stride = rotate.out_head_stride = kDim;
  rotate.out = out.data();
  EXPECT_EQ(api().rotate(backend, &rotate, &error), TQ_OK) << error.message;
  auto expect_rotate = [&](const char* words, auto&& spoil) {
    const TqRotateArgs args = rotate;
    spoil();
    TqError said = make_error();
    EXPECT_EQ(api().rotate(backend, &rotate, &said), TQ_INVALID_ARGUMENT) << words;
    EXPECT_NE(std::string(said.message).find(words), std::string::npos) << said.message;
    rotate = args;
  };
  expect_rotate("num_tokens is -1", [&] { rotate.num_tokens = -1; });
  expect_rotate("num_heads is 0; it must be from 1 to 65536", [&] { rotate.num_heads = 0; });
  expect_rotate("side is 0; it must be TQ_SIDE_QUERY (1)", [&] { rotate.side = 0; });
  expect_rotate("side is 5", [&] { rotate.side = 5; });
  expect_rotate("stream is not NULL; it must be on a CPU backend", [&] { rotate.stream = &error; });
  expect_rotate("x is NULL", [&] { rotate.x = nullptr; });
  expect_rotate("out is NULL", [&] { rotate.out = nullptr; });
  expect_rotate("x_head_stride is 3", [&] { rotate.x_head_stride = 3; });
  expect_rotate("out_token_stride is 63", [&] { rotate.out_token_stride = kDim - 1; });
  expect_rotate("layer is NULL", [&] { rotate.layer = nullptr; });
}

TEST_F(BadInput, Copy) {
  TqError error = make_error();
  const int64_t pairs[] = {0, kBlocks};
  TqCopyPagesArgs copy = {};
  copy.struct_size = sizeof(copy);
  copy.layer = &layer;
  copy.pages = &pages;
  copy.src_dst = pairs;
  copy.num_pairs = 1;
  EXPECT_EQ(api().copy_pages(backend, &copy, &error), TQ_INVALID_ARGUMENT);
  EXPECT_STREQ(error.message, "src_dst[0][1] is block 6; blocks go from 0 to 5");
  auto expect_pairs = [&](const char* words, std::vector<int64_t> list) {
    copy.src_dst = list.data();
    copy.num_pairs = static_cast<int64_t>(list.size() / 2);
    EXPECT_EQ(api().copy_pages(backend, &copy, &error), words[0] != 0 ? TQ_INVALID_ARGUMENT : TQ_OK) << words;
    EXPECT_NE(std::string(error.message).find(words), std::string::npos) << error.message;
  };
  expect_pairs("src_dst[1][1] is block 2, which src_dst[0] writes too", {0, 2, 1, 2});
  expect_pairs("src_dst[1][0] is block 2, which src_dst[0] writes; the pairs have no order", {0, 2, 2, 3});
  expect_pairs("src_dst[0][0] is block 2, which src_dst[1] writes", {2, 3, 0, 2});
  expect_pairs("", {2, 2, 0, 1});
  expect_pairs("", {0, 1, 0, 2});
  expect_pairs("stream is not NULL", [&] {
    copy.stream = &error;
    return std::vector<int64_t>{0, 1};
  }());
}

TEST_F(BadInput, HostFunctions) {
  TqError error = make_error();
  TqFormatInfo info = {};
  info.struct_size = sizeof(info);
  EXPECT_EQ(api().format_by_name("turboquant_4bit", &info, &error), TQ_NOT_FOUND);
  EXPECT_NE(std::string(error.message).find("did you mean 'turboquant_4bit_nc'"), std::string::npos) << error.message;
  for (const char* name : {"auto", "raw_f23"}) {
    EXPECT_EQ(api().format_by_name(name, &info, &error), TQ_NOT_FOUND);
    EXPECT_EQ(std::string(error.message), std::string("there is no KV format '") + name +
                                              "'. Formats are turboquant_k8v4, turboquant_4bit_nc, turboquant_k3v4_nc, "
                                              "turboquant_3bit_nc, tq_8, tq_k5v4, tq_4");
  }
  layer.format_id = 77;
  EXPECT_EQ(api().kv_cache_spec(&layer, nullptr, &error), TQ_INVALID_ARGUMENT);
  EXPECT_NE(std::string(error.message).find("known formats are 257 turboquant_k8v4"), std::string::npos);
  EXPECT_EQ(std::string(error.message).find("raw_f32"), std::string::npos) << error.message;
  layer.format_id = TQ_FORMAT_TURBOQUANT_4BIT_NC;
  EXPECT_EQ(api().format_by_name(nullptr, &info, &error), TQ_INVALID_ARGUMENT);
  float x[16] = {};
  EXPECT_EQ(fake_quantize(TQ_FORMAT_TURBOQUANT_K8V4, TQ_SIDE_KEY, 17, 1, x, x, &error), TQ_INVALID_ARGUMENT);
  EXPECT_EQ(fake_quantize(TQ_FORMAT_TURBOQUANT_K8V4, TQ_SIDE_KEY, 16, -1, x, x, &error), TQ_INVALID_ARGUMENT);
  EXPECT_EQ(fake_quantize(TQ_FORMAT_TURBOQUANT_K8V4, TQ_SIDE_KEY, 16, 1, nullptr, x, &error), TQ_INVALID_ARGUMENT);
  TqCodebookArgs args = {};
  args.struct_size = sizeof(args);
  args.format_id = TQ_FORMAT_TURBOQUANT_K8V4;
  args.side = TQ_SIDE_KEY;
  args.head_dim = 64;
  TqCodebook book = {};
  book.struct_size = sizeof(book);
  EXPECT_EQ(api().codebook(&args, &book, nullptr, nullptr, 0, &error), TQ_NOT_FOUND);
  EXPECT_EQ(api().query_caps(nullptr, nullptr, &error), TQ_INVALID_ARGUMENT);
  EXPECT_EQ(api().store_kv(nullptr, &store, &error), TQ_INVALID_ARGUMENT);
  EXPECT_EQ(api().attend(nullptr, &attend, nullptr), TQ_INVALID_ARGUMENT) << "no error struct, no crash";
  EXPECT_EQ(tq_get_api(2, &error), nullptr);
  EXPECT_NE(std::string(error.message).find("major is 2"), std::string::npos);
}

TEST_F(BadInput, ShortErrorStructIsNotOverrun) {
  struct {
    TqError error;
    char canary[8];
  } box = {};
  box.error.struct_size = offsetof(TqError, message) + 12;
  std::memset(box.error.message, 'x', sizeof(box.error.message));
  attend.causal = 3;
  EXPECT_EQ(api().attend(backend, &attend, &box.error), TQ_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(box.error.message), "causal\xe2\x80\xa6");
  EXPECT_EQ(box.error.message[12], 'x');
}

TEST_F(BadInput, CheckLayerNamesEachUnmetNeed) {
  uint64_t unmet = 1;
  ASSERT_EQ(api().check_layer(backend, &layer, &unmet, nullptr), TQ_OK);
  EXPECT_EQ(unmet, 0u);
  layer.attention_kind = TQ_ATTENTION_MLA;
  layer.head_dim = 576;
  ASSERT_EQ(api().check_layer(backend, &layer, &unmet, nullptr), TQ_OK);
  std::string words;
  for (int bit = 0; bit < 64; ++bit) {
    if ((unmet >> bit & 1) != 0) words += api().unmet_reason(bit);
  }
  EXPECT_NE(words.find("MLA"), std::string::npos);
  EXPECT_NE(words.find("head dimension"), std::string::npos);
  EXPECT_EQ(api().unmet_reason(63), nullptr);
  EXPECT_EQ(api().unmet_reason(-1), nullptr);
}

}  // namespace
}  // namespace tq::testing

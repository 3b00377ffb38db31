// overlap_test.cc - outputs whose rows would be the same memory are refused: threads would race for them.
#include "abi_fixture.h"

namespace tq::testing {
namespace {

class Overlap : public AbiTest {
 protected:
  void expect_refused(int32_t code, const TqError& error, const std::string& words) {
    EXPECT_EQ(code, TQ_INVALID_ARGUMENT) << words;
    EXPECT_NE(std::string(error.message).find(words), std::string::npos) << error.message;
  }
};

TEST_F(Overlap, OutOfAttend) {
  out.resize(static_cast<size_t>(4 * kHeads * kDim));
  attend.out = out.data();
  auto with_strides = [&](int64_t token, int64_t head, TqError* error) {
    attend.out_token_stride = token;
    attend.out_head_stride = head;
    return api().attend(backend, &attend, error);
  };
  TqError error = make_error();
  expect_refused(
      with_strides(kDim, kDim, &error), error,
      "out_token_stride is 64 elements and out_head_stride 64; with 4 heads of 64 elements and 3 tokens rows "
      "would overlap");
  expect_refused(with_strides(kHeads * kDim - 1, kDim, &error), error, "rows would overlap");
  expect_refused(with_strides(kDim, 3 * kDim - 1, &error), error, "rows would overlap");
  expect_refused(with_strides(INT64_MAX / 2, INT64_MAX / 2, &error), error, "rows would overlap");
  EXPECT_EQ(with_strides(kHeads * kDim, kDim, &error), TQ_OK) << error.message;
  EXPECT_EQ(with_strides(kDim, 3 * kDim, &error), TQ_OK) << "head-major: " << error.message;
}

TEST_F(Overlap, OutOfRotate) {
  std::vector<float> x(static_cast<size_t>(3 * kHeads * kDim)), y(x.size());
  TqRotateArgs rotate = {};
  rotate.struct_size = sizeof(rotate);
  rotate.num_heads = kHeads;
  rotate.layer = &layer;
  rotate.num_tokens = 3;
  rotate.side = TQ_SIDE_QUERY;
  rotate.x = x.data();
  rotate.x_token_stride = rotate.x_head_stride = kDim;  // what is only read may be read twice
  rotate.out = y.data();
  rotate.out_token_stride = rotate.out_head_stride = kDim;
  TqError error = make_error();
  expect_refused(api().rotate(backend, &rotate, &error), error, "rows would overlap");
  rotate.out_token_stride = kHeads * kDim;
  EXPECT_EQ(api().rotate(backend, &rotate, &error), TQ_OK) << error.message;
  rotate.out_token_stride = kDim;
  rotate.out_head_stride = 3 * kDim;
  EXPECT_EQ(api().rotate(backend, &rotate, &error), TQ_OK) << "head-major: " << error.message;
}

TEST_F(Overlap, OutputsOfDequant) {
  const size_t rows = static_cast<size_t>(5 * kKvHeads * kDim);
  std::vector<float> both(2 * rows);
  const int32_t first[] = {0}, starts_of[] = {0, 5};
  TqDequantKvArgs dequant = {};
  dequant.struct_size = sizeof(dequant);
  dequant.layer = &layer;
  dequant.pages = &pages;
  dequant.num_seqs = 1;
  dequant.max_blocks_per_seq = 2;
  dequant.block_table = table;
  dequant.block_table_stride = 2;
  dequant.first_tokens = first;
  dequant.token_start_loc = starts_of;
  dequant.num_tokens = 5;
  dequant.key_out = both.data();
  TqError error = make_error();
  for (const size_t at : {size_t{0}, size_t{1}, rows - 1}) {
    dequant.value_out = both.data() + at;
    expect_refused(api().dequant_kv(backend, &dequant, &error), error, "key_out and value_out are the same memory");
  }
  dequant.value_out = both.data() + rows;
  EXPECT_EQ(api().dequant_kv(backend, &dequant, &error), TQ_OK) << error.message;
  std::swap(dequant.key_out, dequant.value_out);
  EXPECT_EQ(api().dequant_kv(backend, &dequant, &error), TQ_OK) << error.message;
  dequant.value_out = nullptr;
  EXPECT_EQ(api().dequant_kv(backend, &dequant, &error), TQ_OK) << error.message;
}

}  // namespace
}  // namespace tq::testing

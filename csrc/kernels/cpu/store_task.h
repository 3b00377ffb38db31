// store_task.h - encode and pack the K and V of one token, decode them, or rotate one, for all heads.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace tq {

// Token t of the call into the page slot that slot_mapping gives; a negative slot is skipped.
void run_store_task(const StoreParams& params, int64_t token);

// A token of sequence seq out of its page, into a row of the outputs.
void run_dequant_task(const DequantParams& params, int seq, int64_t token, int64_t row);

void run_rotate_task(const RotateParams& params, int64_t token);

}  // namespace tq

// validate.h - everything a caller can get wrong, checked before any memory but the argument structs is touched. Each
// failure is one sentence: the argument, what came, what is allowed.
#pragma once

#include <string>

#include "abi/error.h"
#include "codec/format.h"
#include "kernels/kernels.h"
#include "tq_backend.h"

namespace tq {

// A layer whose numbers are in range; head_dim_v is filled in.
struct CheckedLayer {
  TqLayerDesc desc;
  const Format* format;
};

// device_kind is where the call's tables live: on a CPU block tables and slots are checked too, on a GPU reading them
// would need a sync.
Status check_format(uint32_t format_id, const Format** out);
Status check_head_dim(const char* name, int32_t dim);
Status check_layer_desc(const TqLayerDesc* layer, CheckedLayer* out);
Status check_pages(const TqPages* pages, const CheckedLayer& layer, PagedCache* out);
Status check_store(const TqStoreKvArgs* args, bool host_tables, StoreParams* out);
Status check_attend(const TqAttendArgs* args, bool host_tables, AttendParams* out);
Status check_dequant(const TqDequantKvArgs* args, bool host_tables, DequantParams* out);
Status check_copy(const TqCopyPagesArgs* args, bool host_tables, CopyParams* out);
Status check_rotate(const TqRotateArgs* args, bool host_tables, RotateParams* out, CheckedLayer* layer);

}  // namespace tq

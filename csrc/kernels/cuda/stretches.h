// stretches.h - how the line of tiles of a decode launch (schedule.cuh) is dealt out to CTAs.
//
// Equal stretches, whatever rows they cut. Where all rows are equally long (a batch of one, above all) and it costs
// little, borders are moved to ends of rows or rows are cut into equal parts instead: a row that crosses a border is
// merged through the workspace, a warp that goes from row to row prepares a query and leaves two partial results.
//
// A launch of 10 us feels every division here, so what the host can expect it divides (Deal).
#pragma once

#include "kernels/cuda/divisor.h"

namespace tq::cuda {

// Made by the host for a number of rows that the device may find to be wrong.
struct Deal {
  int rows;
  int rows_per_cta;  // rounded up
  Divisor parts;     // of a row, where there are more CTAs than rows
};

// rows, ctas > 0
constexpr Deal make_deal(int64_t rows, int ctas) {
  const int known = rows < 1 << 30 ? static_cast<int>(rows) : 1 << 30;
  return {known, (known + ctas - 1) / ctas, make_divisor(known < ctas ? ctas / known : 1)};
}

// The CTAs that have a part of a row.
struct Owners {
  int first, count;
};

struct Stretches {
  int total;  // tiles of the line
  int quota;  // of a stretch, at most
  int row;    // if > 0: tiles of each row, cut into deal.parts stretches
  Divisor parts;

  // equal: ceil(total / CTAs). row: tiles of every row, 0 if they differ. least: tiles that are worth a CTA; three
  // times as many still take less time than a merge.
  TQ_HOST_DEVICE static Stretches make(const Deal& deal, int total, int equal, int row, int least) {
    Stretches s = {total, equal > least ? equal : least, 0, deal.parts};
    if (row == 0 || total != static_cast<int64_t>(row) * deal.rows) return s;
    const int limit = s.quota + s.quota / 16 > 3 * least ? s.quota + s.quota / 16 : 3 * least;
    const int whole = deal.rows_per_cta * row;
    const int part = deal.parts.divide(row + static_cast<int>(deal.parts.value) - 1);
    if (whole <= limit) {
      s.quota = whole;
    } else if (deal.parts.value > 1 && part >= least && part <= limit) {
      s.quota = part;
      s.row = row;
    }
    return s;
  }

  TQ_HOST_DEVICE int begin(int cta) const { return at(cta, 0); }
  TQ_HOST_DEVICE int end(int cta) const { return at(cta, quota); }

  // Of the row [begin, end), of which cta has a part.
  TQ_HOST_DEVICE Owners owners(int cta, int row_begin, int row_end) const {
    if (row > 0) return {cta - parts.rest(cta), (row - 1) / quota + 1};
    const int first = row_begin / quota;
    return {first, (row_end - 1) / quota - first + 1};
  }

 private:
  TQ_HOST_DEVICE static int smaller(int a, int b) { return a < b ? a : b; }
  TQ_HOST_DEVICE int at(int cta, int offset) const {
    if (row == 0) return smaller(cta * quota + offset, total);
    return smaller(parts.divide(cta) * row + smaller(parts.rest(cta) * quota + offset, row), total);
  }
};

}  // namespace tq::cuda

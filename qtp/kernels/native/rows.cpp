#include "rows.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define QTP_BODY "rows.inl"
#include "each_isa.inl"

namespace qtp {

const RowsTable& rows_table(DType dtype) { return QTP_CHOOSE(kRowsTables)[int(dtype)]; }

}  // namespace qtp

/* Choices in the order of their experts, by counting: an optional speed-up on CPUs. order.py loads it; torch's own sort
   does the same where it is absent. */

#include "vector.h"

/* Choices [num_choices] of experts 0 to num_experts - 1; any other number is of a choice that nobody serves, and stands
   behind all others. Among equals, they stay in the order of their numbers. slot[i] is where choice i stands in order;
   ends has room for num_experts + 1 numbers. */
void mhmoe_sort(const int64_t *experts, int64_t *order, int64_t *slot, int64_t *counts, int64_t *ends,
                int64_t num_choices, int64_t num_experts, int num_threads, const openmp_t *openmp) {
    (void)num_threads, (void)openmp;
    int64_t num_served = 0;
    memset(counts, 0, (size_t)num_experts * sizeof *counts);
    for (int64_t i = 0; i < num_choices; i++)
        if ((uint64_t)experts[i] < (uint64_t)num_experts) counts[experts[i]]++;
    for (int64_t e = 0; e < num_experts; e++) {
        ends[e] = num_served;
        num_served += counts[e];
    }
    ends[num_experts] = num_served;
    for (int64_t i = 0; i < num_choices; i++) {
        int64_t expert = (uint64_t)experts[i] < (uint64_t)num_experts ? experts[i] : num_experts;
        slot[i] = ends[expert]++;
        order[slot[i]] = i;
    }
}

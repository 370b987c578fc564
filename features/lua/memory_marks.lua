-- Say how far each memory version of a user is, as of one instant.
-- KEYS[1] the user's row    KEYS[2] chunks (hash)    KEYS[3] memories (hash)
-- ARGV[1] the mark's field    ARGV[2] events of a chunk    ARGV[3] bytes of a memory
-- ARGV[4], ARGV[5], ... memory versions
-- Returns {chunks that left the tail, first chunk that waits, ordinal the state begins with, chunks
-- folded by each version...}; an empty list where there is no row.
local num_chunks, begins = state_of(KEYS[1], ARGV[2])
if not num_chunks then
  return {}
end
local marks = { num_chunks, tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0'), begins }
for version = 4, #ARGV do
  marks[#marks + 1] = num_chunks > 0 and folded_of(KEYS[3], ARGV[version], ARGV[3], begins) or 0
end
return marks

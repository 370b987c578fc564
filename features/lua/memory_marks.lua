-- Say how far each memory version of a user is, as of one instant.
-- KEYS[1] the user's row    KEYS[2] chunks (hash)    KEYS[3] memories (hash)
-- ARGV[1] the mark's field    ARGV[2] events of a chunk    ARGV[3] bytes of a memory
-- ARGV[4], ARGV[5], ... memory versions
-- Returns {chunks that left the tail, first chunk that waits, ordinal the state begins with, chunks
-- folded by each version...}; an empty list where there is no row.
local trailer = redis.call('GETRANGE', KEYS[1], -28, -13)
if #trailer < 16 then
  return {}
end
local next_ordinal, num_chunks, _, held = struct.unpack('<I4I4I4I4', trailer)
local begins = next_ordinal - num_chunks * tonumber(ARGV[2]) - held
local marks = { num_chunks, tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0'), begins }
for version = 4, #ARGV do
  local memory = num_chunks > 0 and redis.call('HGET', KEYS[3], ARGV[version])
  local folded = 0
  if memory and #memory == tonumber(ARGV[3]) then
    local chunks, its_begin = struct.unpack('<I4I4', memory, 5)
    if its_begin == begins then
      folded = chunks
    end
  end
  marks[#marks + 1] = folded
end
return marks

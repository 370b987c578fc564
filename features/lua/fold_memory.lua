-- Put a memory with more chunks in it in the place of the one it was made from, or do nothing.
-- KEYS[1] the user's row    KEYS[2] the user's memories (hash)
-- ARGV[1] memory version    ARGV[2] events of a chunk    ARGV[3] bytes of a memory
-- ARGV[4] chunks in the memory it was made from, 0 when there was none    ARGV[5] chunks in this one
-- ARGV[6] ordinal that the user's state begins with    ARGV[7] the memory
-- Returns 1 when written. 0: another has folded meanwhile, the user was forgotten, or Redis went
-- back to before the chunks left the tail.
local num_chunks, begins = state_of(KEYS[1], ARGV[2])
if not num_chunks then
  return 0
end
if begins ~= tonumber(ARGV[6]) or num_chunks < tonumber(ARGV[5]) then
  return 0
end
if folded_of(KEYS[2], ARGV[1], ARGV[3], begins) ~= tonumber(ARGV[4]) then
  return 0
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[7])
return 1

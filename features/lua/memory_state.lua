-- What the scripts of memories ask of a user; the other scripts of this kind begin with it.

-- Return how many chunks have left the tail, and the ordinal that the state begins with: 0, or what
-- a forget left. Nothing where there is no row.
local function state_of(row_key, chunk_events)
  local trailer = redis.call('GETRANGE', row_key, -28, -13)
  if #trailer < 16 then
    return nil
  end
  local next_ordinal, num_chunks, _, held = struct.unpack('<I4I4I4I4', trailer)
  return num_chunks, next_ordinal - num_chunks * tonumber(chunk_events) - held
end

-- Return how many chunks a memory has folded: 0 for none, or one of before a forget.
local function folded_of(memories_key, version, memory_bytes, begins)
  local memory = redis.call('HGET', memories_key, version)
  if memory and #memory == tonumber(memory_bytes) then
    local chunks, its_begin = struct.unpack('<I4I4', memory, 5)
    if its_begin == begins then
      return chunks
    end
  end
  return 0
end

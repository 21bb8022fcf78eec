-- Rings: counters over a sliding window, as arrays in a row. Pure arithmetic; the limits (08_limits.sql) use
-- it.
--
-- A ring of n buckets is a bigint[] of 2n + 3 elements:
--   [1..n]      requests of each bucket
--   [n+1..2n]   tokens of each bucket
--   [2n+1]      all requests
--   [2n+2]      all tokens
--   [2n+3]      the number of the newest bucket (unix time / bucket width)
-- The n buckets are those that touch the last window, so their sum misses nothing that happened within it: no
-- interval of the window's length ever exceeds the limit, and a place frees at most one bucket late.

-- Its newest bucket is number 0, which is older than any bucket that is counted in.
create function public.empty_ring(p_size int) returns bigint[]
language sql immutable set search_path = '' as $$
    select array_fill(0::bigint, array[2 * p_size + 3])
$$;
revoke all on function public.empty_ring(int) from public, anon, authenticated;
grant execute on function public.empty_ring(int) to service_role;

create function public.advance_ring(p_ring bigint[], p_size int, p_now bigint) returns bigint[]
language plpgsql immutable as $$
declare
    v_ring bigint[] := p_ring;
    v_newest bigint := p_ring[2 * p_size + 3];
    v_bucket bigint := v_newest;
    v_slot int;
begin
    if p_ring is null or v_newest >= p_now then
        return v_ring;
    end if;
    if p_now - v_newest >= p_size then
        v_ring := array_fill(0::bigint, array[2 * p_size + 3]);
    else
        while v_bucket < p_now loop -- a for loop counts in integers, which these numbers exceed
            v_bucket := v_bucket + 1;
            v_slot := v_bucket % p_size + 1;
            v_ring[2 * p_size + 1] := v_ring[2 * p_size + 1] - v_ring[v_slot];
            v_ring[2 * p_size + 2] := v_ring[2 * p_size + 2] - v_ring[p_size + v_slot];
            v_ring[v_slot] := 0;
            v_ring[p_size + v_slot] := 0;
        end loop;
    end if;
    v_ring[2 * p_size + 3] := p_now;
    return v_ring;
end $$;
comment on function public.advance_ring is
    'The ring with p_now as its newest bucket; a clock that went backwards leaves it as it is.';
revoke all on function public.advance_ring(bigint[], int, bigint) from public, anon, authenticated;
grant execute on function public.advance_ring(bigint[], int, bigint) to service_role;

create function public.count_in_ring(
    p_ring bigint[], p_size int, p_bucket bigint, p_requests bigint, p_tokens bigint
) returns bigint[] language plpgsql immutable as $$
declare
    v_ring bigint[] := p_ring;
    v_newest bigint := p_ring[2 * p_size + 3];
    v_slot int := least(p_bucket, v_newest) % p_size + 1;
begin
    if p_ring is null or p_bucket <= v_newest - p_size then
        return v_ring;
    end if;
    v_ring[v_slot] := v_ring[v_slot] + p_requests;
    v_ring[p_size + v_slot] := v_ring[p_size + v_slot] + p_tokens;
    v_ring[2 * p_size + 1] := v_ring[2 * p_size + 1] + p_requests;
    v_ring[2 * p_size + 2] := v_ring[2 * p_size + 2] + p_tokens;
    return v_ring;
end $$;
comment on function public.count_in_ring is
    'Counts in one bucket of an advanced ring, null for the newest; a bucket that has left the ring counts '
    'no more.';
revoke all on function public.count_in_ring(bigint[], int, bigint, bigint, bigint)
    from public, anon, authenticated;
grant execute on function public.count_in_ring(bigint[], int, bigint, bigint, bigint) to service_role;

create function public.correct_ring(
    p_ring bigint[], p_size int, p_admitted bigint, p_now bigint, p_delta bigint
) returns bigint[] language plpgsql immutable as $$
declare
    v_ring bigint[] := public.advance_ring(p_ring, p_size, p_now);
begin
    return public.count_in_ring(v_ring, p_size, case when p_delta < 0 then p_admitted end, 0, p_delta);
end $$;
comment on function public.correct_ring is
    'More tokens than estimated count now; fewer are taken back where the estimate was counted, so that no '
    'bucket falls below zero.';
revoke all on function public.correct_ring(bigint[], int, bigint, bigint, bigint)
    from public, anon, authenticated;
grant execute on function public.correct_ring(bigint[], int, bigint, bigint, bigint) to service_role;

create function public.ring_frees_at(
    p_ring bigint[], p_size int, p_width_ms bigint, p_offset int, p_excess bigint
) returns bigint language plpgsql immutable as $$
declare
    v_newest bigint := p_ring[2 * p_size + 3];
    v_bucket bigint := v_newest - p_size;
    v_freed bigint := 0;
begin
    while v_bucket < v_newest loop
        v_bucket := v_bucket + 1;
        v_freed := v_freed + p_ring[p_offset + v_bucket % p_size + 1];
        if v_freed >= p_excess then
            return (v_bucket + p_size) * p_width_ms;
        end if;
    end loop;
    return (v_newest + p_size) * p_width_ms;
end $$;
comment on function public.ring_frees_at is
    'When (unix ms) at least p_excess of what was counted will have left the ring; p_offset 0 looks at '
    'requests, p_size at tokens.';
revoke all on function public.ring_frees_at(bigint[], int, bigint, int, bigint)
    from public, anon, authenticated;
grant execute on function public.ring_frees_at(bigint[], int, bigint, int, bigint) to service_role;

-- Keys: making, changing, rotating and revoking them; never broader than the key that does it.
-- Functions take p jsonb and return an outcome. The stamp of an action (actor, address, user_agent, request_id) is in p.

create function public.scopes_within(p_inner jsonb, p_outer jsonb) returns boolean
language sql immutable set search_path = '' as $$
    select not exists (
        select from jsonb_each(p_inner) as verb (name, resources), jsonb_array_elements_text(verb.resources) as resource (name)
        where not coalesce((p_outer -> verb.name) ?| array['*', resource.name], false)
    )
$$;
comment on function public.scopes_within is 'Whether everything that the inner scopes allow is allowed by the outer ones.';
revoke all on function public.scopes_within(jsonb, jsonb) from public, anon, authenticated;
grant execute on function public.scopes_within(jsonb, jsonb) to service_role;

create function public.environment_rank(p_environment text) returns int language sql immutable set search_path = '' as $$
    select case p_environment when 'test' then 1 when 'live' then 3 else 2 end
$$;
revoke all on function public.environment_rank(text) from public, anon, authenticated;
grant execute on function public.environment_rank(text) to service_role;

-- Why a key may not exist at the hands of its maker (the key that asks for it), or null. An administrator's hands have no key.
create function public.broader_than(p_key public.api_keys_new, p_maker public.api_keys_new) returns text
language plpgsql stable set search_path = '' as $$
begin
    if p_maker.id is null then
        return null;
    elsif not public.scopes_within(p_key.scope_permissions, p_maker.scope_permissions) then
        return 'scope_permissions';
    elsif public.environment_rank(p_key.environment_tag) > public.environment_rank(p_maker.environment_tag) then
        return 'environment_tag';
    elsif p_maker.expiration_date is not null and coalesce(p_key.expiration_date, 'infinity') > p_maker.expiration_date then
        return 'expiration_date';
    elsif p_maker.allowed_models is not null
          and (p_key.allowed_models is null or not public.models_allowed(p_maker.allowed_models, p_key.allowed_models)) then
        return 'allowed_models';
    elsif cardinality(p_maker.ip_allowlist) > 0 and (cardinality(p_key.ip_allowlist) = 0 or exists (
            select from unnest(p_key.ip_allowlist) as n where not n <<= any (p_maker.ip_allowlist))) then
        return 'ip_allowlist';
    elsif cardinality(p_maker.domain_referrers) > 0 and (cardinality(p_key.domain_referrers) = 0 or exists (
            select from unnest(p_key.domain_referrers) as d
            where not (d = any (p_maker.domain_referrers)
                       or public.domain_allowed(case when d like '*.%' then array(select m from unnest(p_maker.domain_referrers) m where m like '*.%')
                                                     else p_maker.domain_referrers end, ltrim(d, '*.'))))) then
        return 'domain_referrers';
    elsif p_maker.max_requests is not null and (p_key.id is distinct from p_maker.id or coalesce(p_key.max_requests, 'infinity'::numeric) > p_maker.max_requests) then
        return 'max_requests';
    elsif p_maker.budget_nanos is not null and (p_key.id is distinct from p_maker.id or p_key.budget_nanos is null
          or p_key.budget_nanos > p_maker.budget_nanos or p_key.budget_window <> p_maker.budget_window) then
        return 'budget';
    end if;
    return null;
end $$;
comment on function public.broader_than is
    'A restricted key makes only keys with the same restrictions; one that counts requests or money makes none, as each key counts anew.';
revoke all on function public.broader_than(public.api_keys_new, public.api_keys_new) from public, anon, authenticated;
grant execute on function public.broader_than(public.api_keys_new, public.api_keys_new) to service_role;

create function public.key_view(p_key public.api_keys_new) returns jsonb language sql stable set search_path = '' as $$
    select (to_jsonb(p_key) - 'key_hash' - 'hash_secret_id' - 'encrypted_key' - 'previous_key_hash' - 'previous_hash_secret_id')
           || jsonb_build_object('is_revealable', p_key.encrypted_key is not null, 'requests_used', coalesce(u.requests_used, 0),
                                 'last_used_at', u.last_used_at, 'budget_since', nullif(u.budget_since, '-infinity'),
                                 'budget_spent_nanos', case when u.budget_since < public.budget_start(p_key.budget_window, now()) then 0
                                                            else coalesce(u.budget_spent_nanos, 0) end)
    from (select) as one left join public.rate_limit_usage u on u.subject = 'key' and u.subject_id = p_key.id
$$;
revoke all on function public.key_view(public.api_keys_new) from public, anon, authenticated;
grant execute on function public.key_view(public.api_keys_new) to service_role;

create function public.list_keys(p_user_id bigint) returns jsonb language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(public.key_view(k) order by k.id), '[]') from public.api_keys_new k
    where k.user_id = p_user_id and k.revoked_at is null
$$;
revoke all on function public.list_keys(bigint) from public, anon, authenticated;
grant execute on function public.list_keys(bigint) to service_role;

create function public.audit_key(p jsonb, p_action text, p_key public.api_keys_new, p_details jsonb) returns void
language sql set search_path = '' as $$
    select public.write_audit(p ->> 'actor', p_action, 'key:' || p_key.id, p_key.user_id, p_key.id, p ->> 'address', p ->> 'user_agent',
                              (p ->> 'request_id')::uuid, p_details)
$$;
revoke all on function public.audit_key(jsonb, text, public.api_keys_new, jsonb) from public, anon, authenticated;
grant execute on function public.audit_key(jsonb, text, public.api_keys_new, jsonb) to service_role;

-- The key that acts, after its user's row is locked: it may have been revoked since it was verified.
create function public.acting_key(p jsonb) returns public.api_keys_new language sql stable set search_path = '' as $$
    select k from public.api_keys_new k where k.id = (p ->> 'maker_id')::bigint and k.is_active and k.revoked_at is null
$$;
revoke all on function public.acting_key(jsonb) from public, anon, authenticated;
grant execute on function public.acting_key(jsonb) to service_role;

-- p: user_id, maker_id, key {...}. Outcomes: created, too_many, name_taken, broader, not_found.
create function public.create_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
    v_key public.api_keys_new;
    v_why text;
begin
    if v_user.id is null or v_maker.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_key := jsonb_populate_record(v_key, p -> 'key');
    v_why := public.broader_than(v_key, v_maker);
    if v_why is null and exists (select from public.rate_limit_configs c where c.subject = 'key' and c.subject_id = v_maker.id) then
        v_why := 'rate_limits';
    end if;
    if v_why is not null then
        return jsonb_build_object('outcome', 'broader', 'field', v_why);
    elsif (select count(*) from public.api_keys_new k where k.user_id = v_user.id and k.revoked_at is null and k.is_active) >= 50 then
        return jsonb_build_object('outcome', 'too_many');
    elsif exists (select from public.api_keys_new k where k.user_id = v_user.id and k.revoked_at is null and k.key_name = v_key.key_name) then
        return jsonb_build_object('outcome', 'name_taken');
    end if;
    insert into public.api_keys_new (user_id, key_name, key_prefix, last4, key_hash, hash_secret_id, encrypted_key, environment_tag,
                                     scope_permissions, ip_allowlist, domain_referrers, allowed_models, expiration_date, max_requests,
                                     budget_nanos, budget_window)
    values (v_user.id, v_key.key_name, v_key.key_prefix, v_key.last4, v_key.key_hash, v_key.hash_secret_id, v_key.encrypted_key,
            v_key.environment_tag, v_key.scope_permissions, v_key.ip_allowlist, v_key.domain_referrers, v_key.allowed_models,
            v_key.expiration_date, v_key.max_requests, v_key.budget_nanos, v_key.budget_window)
    returning * into v_key;
    insert into public.rate_limit_usage (subject, subject_id, burst_ring, minute_ring, hour_ring, day_ring)
    values ('key', v_key.id, null, null, null, null);
    perform public.audit_key(p, 'create', v_key, jsonb_build_object('key_name', v_key.key_name, 'environment_tag', v_key.environment_tag));
    return jsonb_build_object('outcome', 'created', 'key', public.key_view(v_key));
end $$;
revoke all on function public.create_key(jsonb) from public, anon, authenticated;
grant execute on function public.create_key(jsonb) to service_role;

-- p: user_id, maker_id, key_id, changes {...}. Outcomes: updated, name_taken, broader, too_many, not_found.
create function public.update_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
    v_key public.api_keys_new;
    v_why text;
begin
    select * into v_key from public.api_keys_new k
    where k.id = (p ->> 'key_id')::bigint and k.user_id = v_user.id and k.revoked_at is null for update;
    if not found or v_maker.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_key := jsonb_populate_record(v_key, p -> 'changes');
    v_why := public.broader_than(v_key, v_maker);
    if v_why is not null then
        return jsonb_build_object('outcome', 'broader', 'field', v_why);
    elsif exists (select from public.api_keys_new k where k.user_id = v_user.id and k.revoked_at is null
                  and k.key_name = v_key.key_name and k.id <> v_key.id) then
        return jsonb_build_object('outcome', 'name_taken');
    elsif v_key.is_active and (select count(*) from public.api_keys_new k where k.user_id = v_user.id and k.revoked_at is null
                               and k.is_active and k.id <> v_key.id) >= 50 then
        return jsonb_build_object('outcome', 'too_many');
    end if;
    update public.api_keys_new k set
        key_name = v_key.key_name, scope_permissions = v_key.scope_permissions, ip_allowlist = v_key.ip_allowlist,
        domain_referrers = v_key.domain_referrers, allowed_models = v_key.allowed_models, expiration_date = v_key.expiration_date,
        max_requests = v_key.max_requests, budget_nanos = v_key.budget_nanos, budget_window = v_key.budget_window,
        is_active = v_key.is_active, updated_at = clock_timestamp()
    where k.id = v_key.id returning * into v_key;
    perform public.audit_key(p, 'update', v_key, jsonb_build_object('fields', (select jsonb_agg(f) from jsonb_object_keys(p -> 'changes') f)));
    return jsonb_build_object('outcome', 'updated', 'key', public.key_view(v_key));
end $$;
revoke all on function public.update_key(jsonb) from public, anon, authenticated;
grant execute on function public.update_key(jsonb) to service_role;

-- p: user_id, maker_id, grace_seconds, keys [{key_id, key_hash, hash_secret_id, last4, encrypted_key}]: all of them or none.
-- Outcomes: rotated, broader, not_found.
create function public.rotate_keys(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
    v_new record;
    v_key public.api_keys_new;
    v_until timestamptz := clock_timestamp() + make_interval(secs => (p ->> 'grace_seconds')::int);
    v_views jsonb := '[]';
begin
    for v_new in select n.* from jsonb_to_recordset(p -> 'keys')
                 as n (key_id bigint, key_hash text, hash_secret_id text, last4 text, encrypted_key text) loop
        select * into v_key from public.api_keys_new k where k.id = v_new.key_id and k.user_id = v_user.id and k.revoked_at is null;
        if not found or v_maker.id is null then
            return jsonb_build_object('outcome', 'not_found', 'key_id', v_new.key_id);
        elsif public.broader_than(v_key, v_maker) is not null then
            return jsonb_build_object('outcome', 'broader', 'field', public.broader_than(v_key, v_maker), 'key_id', v_key.id);
        end if;
    end loop;
    for v_new in select n.* from jsonb_to_recordset(p -> 'keys')
                 as n (key_id bigint, key_hash text, hash_secret_id text, last4 text, encrypted_key text) loop
        update public.api_keys_new k set
            previous_key_hash = k.key_hash, previous_hash_secret_id = k.hash_secret_id, previous_valid_until = v_until,
            key_hash = v_new.key_hash, hash_secret_id = v_new.hash_secret_id, last4 = v_new.last4,
            encrypted_key = case when k.encrypted_key is not null then v_new.encrypted_key end, updated_at = clock_timestamp()
        where k.id = v_new.key_id returning * into v_key;
        perform public.audit_key(p, 'rotate', v_key, jsonb_build_object('grace_seconds', (p ->> 'grace_seconds')::int));
        v_views := v_views || public.key_view(v_key);
    end loop;
    return jsonb_build_object('outcome', 'rotated', 'keys', v_views);
end $$;
revoke all on function public.rotate_keys(jsonb) from public, anon, authenticated;
grant execute on function public.rotate_keys(jsonb) to service_role;

-- p: user_id (null: anybody's, for an administrator), key_id. Outcomes: revoked, not_found.
create function public.revoke_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p || jsonb_build_object('user_id', coalesce((p ->> 'user_id')::bigint, (
        select k.user_id from public.api_keys_new k where k.id = (p ->> 'key_id')::bigint))));
    v_key public.api_keys_new;
begin
    update public.api_keys_new k set is_active = false, is_primary = false, revoked_at = clock_timestamp(), updated_at = clock_timestamp(),
        encrypted_key = null, previous_key_hash = null, previous_hash_secret_id = null, previous_valid_until = null
    where k.id = (p ->> 'key_id')::bigint and k.user_id = v_user.id and k.revoked_at is null returning * into v_key;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    perform public.audit_key(p, 'delete', v_key, jsonb_build_object('key_name', v_key.key_name));
    return jsonb_build_object('outcome', 'revoked', 'user_id', v_key.user_id, 'key_id', v_key.id);
end $$;
revoke all on function public.revoke_key(jsonb) from public, anon, authenticated;
grant execute on function public.revoke_key(jsonb) to service_role;

-- p: user_id, maker_id, key_id. Outcomes: revealed (with the token), not_revealable, broader, not_found. Every look is audited.
create function public.reveal_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
    v_key public.api_keys_new;
begin
    select * into v_key from public.api_keys_new k where k.id = (p ->> 'key_id')::bigint and k.user_id = v_user.id and k.revoked_at is null;
    if not found or v_maker.id is null then
        return jsonb_build_object('outcome', 'not_found');
    elsif v_key.encrypted_key is null then
        return jsonb_build_object('outcome', 'not_revealable');
    elsif public.broader_than(v_key, v_maker) is not null then
        return jsonb_build_object('outcome', 'broader', 'field', public.broader_than(v_key, v_maker));
    end if;
    perform public.audit_key(p, 'reveal', v_key, null);
    return jsonb_build_object('outcome', 'revealed', 'encrypted_key', v_key.encrypted_key, 'key', public.key_view(v_key));
end $$;
revoke all on function public.reveal_key(jsonb) from public, anon, authenticated;
grant execute on function public.reveal_key(jsonb) to service_role;

-- p: keys [{user_id, key_sha256, key_name, key_prefix, last4, environment_tag, ...}]. Known ones are left as they are.
-- Outcomes: imported, not_found (with the user_id that does not exist: nothing is imported).
create function public.import_keys(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_missing bigint;
    v_count int;
begin
    select (i ->> 'user_id')::bigint into v_missing from jsonb_array_elements(p -> 'keys') as i
    where not exists (select from public.users u where u.id = (i ->> 'user_id')::bigint and u.deleted_at is null) limit 1;
    if found then
        return jsonb_build_object('outcome', 'not_found', 'user_id', v_missing);
    end if;
    perform public.lock_users(array(select (i ->> 'user_id')::bigint from jsonb_array_elements(p -> 'keys') as i));
    insert into public.api_keys (user_id, key_sha256, key_name, key_prefix, last4, environment_tag, scope_permissions, expiration_date,
                                 max_requests, is_active)
    select k.user_id, k.key_sha256, k.key_name, k.key_prefix, k.last4, k.environment_tag, k.scope_permissions, k.expiration_date,
           k.max_requests, k.is_active
    from jsonb_populate_recordset(null::public.api_keys, p -> 'keys') as k
    on conflict (key_sha256) do nothing;
    get diagnostics v_count = row_count;
    perform public.write_audit(p ->> 'actor', 'import_keys', null, null, null, p ->> 'address', p ->> 'user_agent',
                               (p ->> 'request_id')::uuid, jsonb_build_object('imported', v_count));
    return jsonb_build_object('outcome', 'imported', 'imported', v_count, 'known', jsonb_array_length(p -> 'keys') - v_count);
end $$;
revoke all on function public.import_keys(jsonb) from public, anon, authenticated;
grant execute on function public.import_keys(jsonb) to service_role;

-- Keys by what is shown of them (prefix and last 4), name or user, for an administrator.
create function public.find_keys(p_text text, p_user_id bigint, p_before bigint, p_limit int) returns jsonb
language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(public.key_view(k) order by k.id desc), '[]') from (
        select * from public.api_keys_new k
        where (p_user_id is null or k.user_id = p_user_id) and (p_before is null or k.id < p_before)
          and (p_text is null or k.last4 = right(p_text, 4) and starts_with(p_text, k.key_prefix) or strpos(lower(k.key_name), lower(p_text)) > 0
               or starts_with(k.key_prefix, p_text))
        order by k.id desc limit p_limit) as k
$$;
revoke all on function public.find_keys(text, bigint, bigint, int) from public, anon, authenticated;
grant execute on function public.find_keys(text, bigint, bigint, int) to service_role;
